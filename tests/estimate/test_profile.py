"""Shapes of models without their weights: names of layers, and shapes with layers left out."""

import pytest
import torch
from helpers.families import TOKENS, first_is_fast, is_layer, save_model
from helpers.whole import streamed
from transformers import AutoModelForCausalLM

from sparsefw.checkpoint.source import inspect
from sparsefw.estimate.profile import shape_of
from sparsefw.model.experts import experts_of
from sparsefw.model.forward import embed
from sparsefw.model.layers import kind_of
from sparsefw.model.stages import survey


def shape(folder):
    return shape_of(inspect(folder))


def ways(role):
    """A role without the numbers of calls, which depend on the tokens."""
    return role.segment, role.input is None, role.write is None, role.cacheable


@pytest.mark.parametrize("family", first_is_fast(["qwen2_moe", "llama", "gpt_neox", "mamba"]))
def test_layers_are_those_that_calibration_finds(family, tmp_path):
    """Though all weights of a shape are zero."""
    folder = save_model(tmp_path, family)
    found, seen = shape(folder), []
    with streamed(folder) as model:
        # All windows at once reach every expert.
        states = embed(model, TOKENS, len(TOKENS))
        for i, block in enumerate(model.blocks):
            model.open(i)
            known = dict(split_failures={}, experts=experts_of(block))
            surveyed = survey(block, states.run_of(i, 0), states.hidden[0], is_layer, **known)
            seen += [f"{model.names[i]}.{layer.name}" for layer in surveyed.layers]
            roles = {kind_of(name, surveyed.experts): ways(role) for name, role in surveyed.roles.items()}
            assert {layer.name: ways(layer.role) for layer in found.blocks[i].layers} == roles
            states.advance(i)
    assert sorted(found.layer_names) == sorted(seen)


@pytest.mark.parametrize("family", first_is_fast(["gemma4_text", "llama", "glm_moe_dsa"]))
def test_a_cache_has_room_for_keys_and_values(family, tmp_path):
    """Of every block, whatever config it has."""
    folder = save_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = model(TOKENS[:1], use_cache=True).past_key_values.layers
    taken = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values) if x is not None)
    per_token = shape(folder).cache
    assert taken / TOKENS.shape[1] <= per_token <= 4 * taken / TOKENS.shape[1]


@pytest.mark.parametrize(("family", "itemsize"), [("llama", 2), ("mamba", 4)])
def test_heads_that_return_fp32(family, itemsize, tmp_path):
    """Mamba's logits are in fp32, whatever its weights are in."""
    found = shape(save_model(tmp_path, family, torch.bfloat16))
    assert (found.itemsize, found.logits_itemsize) == (2, itemsize)


def test_selected_layers(tmp_path):
    whole = shape(save_model(tmp_path, "mixtral"))
    experts = "model.layers.1.mlp.experts"
    left_out = {"model.layers.0.self_attn.q_proj.weight", *(f"{experts}.down_proj[{e}]" for e in (0, 2, 3))}
    left_out |= {f"{experts}.gate_up_proj[{e}]" for e in range(4)}
    some = whole.selected(lambda name: name not in left_out and "layers.2" not in name)
    assert some.layer_names == [n for n in whole.layer_names if n not in left_out and "layers.2" not in n]
    first, second, third = some.blocks
    assert first.layers == whole.blocks[0].layers[1:]
    *others, down = second.layers
    assert tuple(others) == whole.blocks[1].layers[:-2]
    assert (down.name, down.experts) == ("mlp.experts.down_proj*", 1)
    assert third.layers == ()
    # Blocks without a selection stay equal, and the bytes of blocks are those of all tensors.
    assert whole.blocks[0] == whole.blocks[1] != first
    assert [block.nbytes for block in some.blocks] == [block.nbytes for block in whole.blocks]
