"""Blocks that run one at a time give the whole model's results, for every family."""

import pytest
import torch
from helpers.checkpoints import refused
from helpers.commands import tensors_of
from helpers.families import TOKENS, VOCABULARY, change_config, save_model
from helpers.kernel_inputs import DEVICE
from helpers.tensors import assert_equal
from helpers.verifying import change_tensor

from sparsefw.checkpoint.source import inspect
from sparsefw.model.forward import embed
from sparsefw.model.streamed import StreamedModel


def open_model(folder):
    return StreamedModel(inspect(folder), DEVICE)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError),
    ],
)
def test_memory_that_is_full_while_experts_are_stacked(error, raised, tmp_path, monkeypatch):
    """transformers catches every exception there, and goes on without the parameter."""

    def full(*args, **kwargs):
        raise error

    model = open_model(save_model(tmp_path, "qwen3_moe"))
    monkeypatch.setattr(torch, "stack", full)
    with pytest.raises(raised):
        model.open(0)


def test_nan_in_a_weight_is_named(tmp_path):
    folder = save_model(tmp_path, "llama")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        change_tensor(folder, name, lambda x: x.index_fill(0, torch.tensor([3]), torch.nan))
    model = open_model(folder)
    model.open(0)
    with refused(r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        model.open(1)
    with refused(r"model\.norm\.weight.*NaN"), model.outside_loaded():
        pass


def test_overflowing_activations_are_named(tmp_path):
    folder = save_model(tmp_path, "llama", torch.float16)
    change_tensor(folder, "model.layers.1.mlp.down_proj.weight", lambda x: torch.full_like(x, 60000))
    model = open_model(folder)
    states = embed(model, TOKENS, 6)
    for i in (0, 1):
        model.open(i)
    states.advance(0)
    with refused(r"activations after model\.layers\.1"):
        states.advance(1)


def test_tokens_without_an_embedding(tmp_path):
    model = open_model(save_model(tmp_path, "llama"))
    with refused(f"token {VOCABULARY}: the model embeds {VOCABULARY} tokens"):
        embed(model, torch.tensor([[2, VOCABULARY]]), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 64}, r"mlp\.\w+_proj\.weight: the checkpoint has shape"),
        ({"num_hidden_layers": 4}, r"model\.layers\.3\..* missing from the checkpoint \(9 in all\)"),
        ({"model_type": "nonsense"}, "has no class for model_type nonsense"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, "is never run"),
        ({"hidden_size": -4}, "cannot load"),
    ],
)
def test_config_that_does_not_fit(tmp_path, changes, message):
    folder = save_model(tmp_path, "llama")
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    change_config(folder, **changes)
    with refused(message):
        open_model(folder)


def test_integers_in_place_of_weights(tmp_path):
    folder = save_model(tmp_path, "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensor(folder, name, lambda W: (100 * W).to(torch.int8))
    with refused(f"tensor {name} has dtype torch.int8"):
        open_model(folder)


def test_tensors_that_the_model_does_not_use_are_named_and_written(tmp_path):
    folder = save_model(tmp_path, "llama")
    # In another dtype than the model, and with a value that no weight may have.
    name = "model.layers.2.input_layernorm.weight"
    change_tensor(folder, name, lambda x: x.to(torch.bfloat16).index_fill(0, torch.tensor([1]), -torch.inf))
    change_config(folder, num_hidden_layers=2)
    model = open_model(folder)
    (note,) = model.notes
    assert note.endswith(f"{name} first")
    written = {name: tensor for piece in model.pieces for name, tensor in model.other_tensors(piece).items()}
    stored = tensors_of(folder)
    assert {n for n in stored if "layers.2." in n} < written.keys()
    assert_equal(written, {name: stored[name] for name in written})


def test_a_block_that_is_set_aside_comes_back_as_it_was(tmp_path):
    """Such as one with other weights, while the model's own block runs."""
    model = open_model(save_model(tmp_path, "llama"))
    own = model.open_alone(0, {name: x + 1 for name, x in model.read(0).items()}).state_dict(keep_vars=True)
    with model.set_aside(1), model.set_aside(0):
        assert all(x.is_meta for x in model.blocks[0].parameters())
        assert not any(torch.equal(x, own[name]) for name, x in model.open_alone(0).named_parameters())
        model.open_alone(1)
    assert all(x is own[name] for name, x in model.blocks[0].named_parameters())
    model.close(0)
    assert all(x.is_meta for block in model.blocks for x in block.parameters())
