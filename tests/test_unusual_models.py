"""Models in memory of which some part is out of the ordinary: wrappers, tensors in one memory, adapters, locks."""

import re
import threading

import pytest
import torch
from helpers.stacks import drawn
from safetensors.torch import load_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sparsefw import InputError, prune

QUICK = dict(kernel="torch", steps=3, refit=2, rounds=0, reconstruct=0, sparsity="0.5")


class _Blocks(nn.Module):
    """Three blocks, one after the other."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_wrapped_blocks():
    """A wrapper for activation checkpointing leaves its own name out of the names in `state_dict`."""
    (model, batches), (wrapped, _) = drawn("diffusion"), drawn("diffusion")
    wrapped.singles = nn.ModuleList(map(checkpoint_wrapper, wrapped.singles))
    for block in wrapped.doubles:
        for name, child in block.named_children():
            setattr(block, name, checkpoint_wrapper(child))
    one, other = (
        prune(m, calibration=batches, method="wanda", compare=("ria",), kernel="torch") for m in (model, wrapped)
    )
    assert len(one.layers) == len(other.layers)
    for name, tensor in wrapped.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert any((tensor == 0).float().mean() >= 0.5 for tensor in wrapped.singles.parameters())


def test_weights_in_one_memory_stay_dense(tmp_path):
    """Each block is pruned in a copy, and the last one would decide for all."""
    model, x = _Blocks(), torch.randn(16, 8)
    model.blocks[2][0].weight.data = model.blocks[0][0].weight.data
    before = model.blocks[0][0].weight.detach().clone()
    result = prune(model, tmp_path / "out", calibration=[x], **QUICK)
    assert [layer.name for layer in result.layers] == [f"blocks.{n}.weight" for n in ("0.2", "1.0", "1.2", "2.2")]
    assert result.report.notes == ["stay dense: 2 parameters that blocks share, blocks.0.0.weight first"]
    assert torch.equal(model.blocks[0][0].weight, before)
    loaded = _Blocks()
    loaded.blocks[2][0].weight.data = loaded.blocks[0][0].weight.data
    load_model(loaded, tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("given", ["calibration", "dataset"])
def test_models_with_adapters(given):
    """Their library writes the adapters alone."""
    data = {given: [torch.randn(4, 8)] if given == "calibration" else torch.ones(2, 4).long()}
    model = _Blocks()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.ReLU, "__module__", "peft.tuners.lora.layer")
        model.blocks[2].append(nn.ReLU())
        line = re.escape("blocks.2.3: is an adapter of peft; merge the adapters first: merge_and_unload()")
        with pytest.raises(InputError, match=line):
            prune(model, **data)


def test_a_block_that_cannot_be_copied():
    model, x = _Blocks(), torch.randn(16, 8)
    model.blocks[2].lock = threading.Lock()
    assert prune(model, calibration=[x], **QUICK).layers
