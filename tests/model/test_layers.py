"""Prunable matrices are found where they are used, with the Gram matrices of their inputs."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsefw.kernels.backend import TORCH
from sparsefw.model.layers import layer_of, not_pruned
from sparsefw.model.measure import capture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sizes(layers):
    """Number of weights by the name of a layer."""
    return {layer.name: layer.weight.numel() for layer in layers}


@pytest.mark.parametrize("out", [1, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_the_order_in_memory_is_not_the_order_of_the_axes(out, turned):
    """A parameter may be a transposed tensor, as of a Conv1D that was made a Linear. A Linear still has (out, in)."""
    blocks = nn.Linear(8, out, bias=False), Conv1D(out, 8)
    if turned:
        for block in blocks:
            block.weight = nn.Parameter(block.weight.detach().T.clone().T)
    x = torch.randn(5, 8)
    found = [capture(block, lambda j, block=block: block(x), [0], backend=TORCH).layers[0] for block in blocks]
    assert [layer.weight.shape for layer in found] == [(out, 8), (out, 8)]
    assert [layer.transposed for layer in found] == [False, True]
    for layer, block in zip(found, blocks, strict=True):
        again = layer_of(block, "weight", "weight", (out, 8), layer.transposed)
        assert again.weight.shape == layer.weight.shape
        assert again.weight.data_ptr() == block.weight.data_ptr()


class _Parts(nn.Module):
    """Multiplies with some rows of a matrix at a time."""

    def __init__(self, *rows):
        super().__init__()
        self.inner, self.rows = nn.Linear(8, 6, bias=False).requires_grad_(False), rows

    def forward(self, x):
        return torch.cat([nn.functional.linear(x[n], self.inner.weight[rows]) for n, rows in enumerate(self.rows)], -1)


@pytest.mark.parametrize("rows", [slice(4), slice(1, 3), slice(0, 6, 2), [0, 1, 2]])
def test_a_part_of_a_matrix_is_not_a_layer(rows):
    """Only parts of one size, one below the other, can be told by an index."""
    block, x = _Parts(rows), torch.randn(1, 5, 8)
    captured = capture(block, lambda j: block(x), [0], backend=TORCH)
    assert captured.layers == captured.ignored == []
    assert captured.grams == {}
    assert not_pruned(block, {}) == ["inner.weight"]


def test_parts_of_one_size_are_layers():
    """As in DBRX, where the experts lie one below the other in one matrix."""
    block, x = _Parts(slice(4, 6), slice(2)), torch.randn(2, 5, 8)
    captured = capture(block, lambda j: block(x), [0], backend=TORCH)
    assert [layer.name for layer in captured.layers] == ["inner.weight[2]", "inner.weight[0]"]
    for n, layer in enumerate(captured.layers):
        assert torch.equal(layer.weight, block.inner.weight[block.rows[n]])
        torch.testing.assert_close(captured.grams[layer.gram], x[n].T @ x[n])
    assert not_pruned(block, sizes(captured.layers)) == ["inner.weight[1]"]
    captured.layers[0].weight.zero_()
    assert not block.inner.weight[4:].any()
    assert block.inner.weight[:4].all()
