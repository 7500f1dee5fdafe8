"""Stages: which layers are pruned together, and how much of the block each of them runs."""

import pytest
import torch
from helpers.damaged import damaged_module, damaged_pair, described, pruned_block, stages_of
from helpers.families import first_is_fast, save_model
from torch import nn

from sparsefw.model.stages import survey

# By family, the stages of its first block as `described` has them.
LLAMA = """
    q_proj k_proj v_proj   reads    0  mul
    o_proj                 writes   0  reshape  kept  to 1
    gate_proj up_proj      reads    1  mul
    down_proj              writes   1  mul      kept
"""
STAGES = {
    "llama": LLAMA,
    # A norm lies between a layer and the sum.
    "gemma2": LLAMA.replace("writes", "reads "),
    # It has no norm before a layer.
    "olmo2": """
    q_proj k_proj v_proj   reads    0  block
    o_proj                 reads    0  reshape  kept  to 1
    gate_proj up_proj      reads    1  add
    down_proj              reads    1  mul      kept
""",
    "gpt2": """
    c_attn                 reads    0  view
    c_proj                 writes   0  view     kept  to 1
    c_fc                   reads    1  view
    c_proj                 writes   1  view     kept
""",
    # Parallel branches: no tensor is enough to go on from.
    "gpt_neox": """
    query_key_value        reads    0  layer_norm
    dense                  outputs  0
    dense_h_to_4h          reads    0  layer_norm
    dense_4h_to_h          outputs  0
""",
    "mamba": """
    in_proj                reads    0  mul
    x_proj                 reads    0  transpose
    dt_proj                outputs  0
    out_proj               writes   0  transpose  kept
""",
    "qwen2_moe": """
    q_proj k_proj v_proj   reads    0  mul
    o_proj                 writes   0  reshape  kept  to 1
    gate_proj up_proj      reads    1  view
    down_proj              reads    1  mul
    gate_up_proj*          outputs  1
    down_proj*             outputs  1
""",
}


@pytest.mark.parametrize(
    "family", first_is_fast(sorted(STAGES, key=lambda x: x not in ("llama", "gpt_neox", "qwen2_moe")), 3)
)
def test_stages_of_families(family, tmp_path):
    expected = [" ".join(line.split()) for line in STAGES[family].strip().splitlines()]
    assert described(damaged_pair(save_model(tmp_path, family))) == expected


def test_a_layer_alone_and_no_layer():
    x = torch.randn(20, 8)
    (stage,) = stages_of(damaged_module(nn.Linear(8, 8), [x]))
    assert (stage.key, stage.last, stage.final, stage.next_start) == ("weight", "weight", True, None)
    norm = nn.Sequential(nn.LayerNorm(8), nn.Unflatten(1, (2, 4)), nn.Flatten())
    norm.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    assert stages_of(damaged_module(norm, [x])) == []


def test_blocks_of_a_kind_are_tried_once(tmp_path):
    """The first block of a kind is run in parts; those that make the same calls are not."""
    pair, known, runs = damaged_pair(save_model(tmp_path, "llama")), {}, []

    def counted(hidden):
        runs.append(hidden)
        return pair.pruned.run_of(0, 0)(hidden)

    given = dict(split_failures=known, experts=pair.experts)
    first = survey(pruned_block(pair), counted, pair.pruned.hidden[0], **given)
    # The block as it is; whole, at its cut, and at the two inputs that can be kept.
    assert (len(runs), list(known.values())) == (5, [""])
    runs.clear()
    second = survey(pruned_block(pair), counted, pair.pruned.hidden[0], **given)
    assert len(runs) == 1
    assert (second.roles, second.cuts) == (first.roles, first.cuts)
