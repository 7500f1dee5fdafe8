"""Expected memory of a pass."""

import pytest
import torch
from helpers.families import save_model

from sparsefw.checkpoint import inspect
from sparsefw.evaluation.room import trial_bytes
from sparsefw.model import shape_of


@pytest.mark.parametrize(("family", "entries"), [("llama", 32 * 48), ("qwen3_moe", 32 * 48), ("gpt2", 32 * 96)])
def test_trial_in_half_precision(family, entries, tmp_path):
    save_model(tmp_path / "half", family, torch.bfloat16)
    save_model(tmp_path / "whole", family)
    assert trial_bytes(shape_of(inspect(tmp_path / "half"))) == 4 * entries
    assert trial_bytes(shape_of(inspect(tmp_path / "whole"))) == 0


def test_logits_by_row_where_the_text_is_read_behind_the_last_block(tmp_path):
    save_model(tmp_path / "llama", "llama")
    save_model(tmp_path / "behind", "inkling2_text", n_layers_per_attn_res_block=8)
    shapes = {name: shape_of(inspect(tmp_path / name)) for name in ("llama", "behind")}
    assert shapes["llama"].by_window
    assert not shapes["behind"].by_window
