"""Models in memory of which some part is out of the ordinary: wrappers, tensors in one memory, adapters, locks."""

import re
import threading

import pytest
import torch
from helpers.checkpoints import refused
from helpers.stacks import QUICK, drawn, small, small_batches, weights_of
from safetensors.torch import load_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sparsefw import prune


def assert_same_weights(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_wrapped_blocks():
    """A wrapper for activation checkpointing leaves its own name out of the names in `state_dict`."""
    (model, batches), (wrapped, _) = drawn("diffusion"), drawn("diffusion")
    for one in (model, wrapped):
        one.singles[1].out.weight = one.singles[0].out.weight
    wrapped.singles = nn.ModuleList(map(checkpoint_wrapper, wrapped.singles))
    for block in wrapped.doubles:
        for name, child in block.named_children():
            setattr(block, name, checkpoint_wrapper(child))
    one, other = (
        prune(m, calibration=batches, method="wanda", compare=("ria",), kernel="torch") for m in (model, wrapped)
    )
    assert len(one.layers) == len(other.layers)
    assert one.report.kept_dense == [f"singles.{n}.out.weight" for n in (0, 1)]
    assert_same_weights(model, wrapped)
    assert any((tensor == 0).float().mean() >= 0.5 for tensor in wrapped.singles.parameters())


def sharing_memory():
    model = small(0, 1, 2)
    model.blocks[2].fc1.weight.data = model.blocks[0].fc1.weight.data
    return model


def test_weights_in_one_memory_stay_dense(out):
    """Each block is pruned in a copy, and the last one would decide for all."""
    model = sharing_memory()
    before = weights_of(model)["blocks.0.fc1.weight"]
    result = prune(model, out, calibration=small_batches(), **QUICK)
    assert [layer.name for layer in result.layers] == [
        f"blocks.{n}.weight" for n in ("0.fc2", "1.fc1", "1.fc2", "2.fc2")
    ]
    assert result.report.kept_dense == ["blocks.0.fc1.weight", "blocks.2.fc1.weight"]
    assert torch.equal(model.blocks[0].fc1.weight, before)
    loaded = sharing_memory()
    load_model(loaded, out / "model.safetensors")
    assert_same_weights(model, loaded)


def test_weights_in_one_buffer(out):
    """They stay there, as a training loop has laid them."""
    model, batches = drawn("diffusion")
    flat = torch.cat([*(x.detach().flatten() for x in model.parameters()), torch.zeros(8)])
    places = flat[:-8].split([x.numel() for x in model.parameters()])
    for x, place in zip(model.parameters(), places, strict=True):
        x.data = place.view(x.shape)
    prune(model, out, calibration=batches, **QUICK)
    loaded, _ = drawn("diffusion")
    load_model(loaded, out / "model.safetensors")
    assert_same_weights(model, loaded)
    assert all(x.data_ptr() == place.data_ptr() for x, place in zip(model.parameters(), places, strict=True))


@pytest.mark.parametrize("steps", [(1, 16), (16, 2)])
def test_weights_with_gaps_and_buffers_that_share_memory(steps):
    model = small()
    layer = model.blocks[0].fc1
    layer.weight = nn.Parameter(torch.randn(256).as_strided(layer.weight.shape, steps))
    layer.register_buffer("scale", torch.ones(1).expand(8))
    prune(model, calibration=small_batches(), **QUICK)
    assert (layer.weight == 0).any()


@pytest.mark.parametrize("given", ["calibration", "dataset"])
def test_models_with_adapters(given):
    """Their library writes the adapters alone."""
    data = {given: small_batches() if given == "calibration" else torch.ones(2, 4).long()}
    model = small()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.GELU, "__module__", "peft.tuners.lora.layer")
        with refused(re.escape("blocks.0.act: is an adapter of peft")):
            prune(model, **data)


def test_a_block_that_cannot_be_copied():
    model = small()
    model.blocks[1].lock = threading.Lock()
    assert prune(model, calibration=small_batches(), **QUICK).layers


def test_buffers_that_blocks_write_to():
    """Whether in place or not, they are as they were."""

    def count(block, args):
        block.calls += 1
        block.tokens = block.tokens + args[0].shape[0]

    model = small()
    for block in model.blocks:
        block.register_buffer("calls", torch.zeros(()))
        block.register_buffer("tokens", torch.zeros(()))
        block.register_forward_pre_hook(count)
    prune(model, calibration=small_batches(), **QUICK)
    assert not any(buffer.any() for buffer in model.buffers())
