"""Recorded outputs: the difference between the dense model's outputs and a layer's own, times its inputs."""

import copy
import functools
import weakref

import pytest
import torch
from torch import nn

from sparsefw.kernels.backend import TORCH
from sparsefw.model.layers import Stage
from sparsefw.model.measure import capture
from sparsefw.model.tape import Calls


def added(x, a, b):
    return x + a(x)


def both_added(x, a, b):
    return x + (a(x) + b(x))


def alone(x, a, b):
    return a(x)


def compared(block, dense, run, batches=(0,)):
    """What is captured of a block beside the dense one; run(block, j) runs micro-batch j through either of them."""
    runs = functools.partial(run, block), functools.partial(run, dense)
    return capture(block, runs[0], batches, backend=TORCH, dense=(dense, runs[1]), experts=frozenset())


@pytest.mark.parametrize(
    ("combine", "layers", "what"),
    [
        (added, "a", added),
        # Both layers write to the stream at once.
        (both_added, "ab", both_added),
        (lambda x, a, b: x + a(x).view(4, 5, 8).view(20, 8), "a", added),
        (lambda x, a, b: x + nn.functional.dropout(a(x), 0.5, False), "a", added),
        # The tensor itself is returned.
        (lambda x, a, b: x + a(x).to(x.dtype), "a", added),
        # The result is no longer the layer's output: scaled, or of another shape.
        (lambda x, a, b: torch.add(x, a(x), alpha=3), "a", alone),
        (lambda x, a, b: x + 3 * a(x), "a", alone),
        (lambda x, a, b: a(x).reshape(40, 4), "a", alone),
        # Only some tokens are sent to the layer, more than in the dense model.
        (lambda x, a, b: a(x[x[:, 1] > x[0, 1]]), "", None),
    ],
)
def test_sums_that_outputs_go_into(combine, layers, what):
    block = nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"}).requires_grad_(False)
    dense, x, lossy = copy.deepcopy(block), torch.randn(20, 8), torch.randn(20, 8)
    x[0, 1], lossy[0, 1] = 0, -100
    crosses = compared(block, dense, lambda b, j: combine(lossy if b is block else x, *b.values())).crosses
    assert set(crosses) == {f"{name}.weight" for name in layers}
    for name in layers:
        D = what(x, *dense.values()) - what(lossy, *block.values())
        torch.testing.assert_close(crosses[f"{name}.weight"].matrix, D.T @ lossy, rtol=1e-4, atol=1e-3)


def test_outputs_that_are_written_to_are_not_used():
    """An activation in place overwrites the output of the layer before it."""
    block = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 8)).requires_grad_(False)
    dense, x = copy.deepcopy(block), torch.randn(20, 8)
    block[0].weight[:, ::2] = 0
    captured = compared(block, dense, lambda block, j: block(x))
    assert [layer.name for layer in captured.layers] == ["0.weight", "2.weight"]
    assert set(captured.crosses) == {"2.weight"}


def test_a_forward_ends_before_the_product_after_the_stage():
    """That product may be the largest of a block."""
    block, x, made = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).requires_grad_(False), torch.randn(20, 8), []
    with Calls(lambda func, args, kwargs: (made.append(func), func(*args, **kwargs))[1]):
        stage = Stage("1.weight", "1.weight")
        captured = capture(block, lambda j: block(x), [0], backend=TORCH, stage=stage, experts=frozenset())
    assert [layer.name for layer in captured.layers] == ["1.weight"]
    assert made.count(nn.functional.linear) == 2


def test_nothing_of_a_micro_batch_outlives_it():
    """Its memory is free for the next one."""
    block, kept = nn.Linear(8, 8).requires_grad_(False), []
    dense = copy.deepcopy(block)

    def run(block, j):
        assert not any(tensor() is not None for number, tensor in kept if number < j)
        x = torch.randn(20, 8)
        out = block(x)
        kept.extend((j, weakref.ref(tensor)) for tensor in (x, out))

    captured = compared(block, dense, run, range(3))
    assert (len(kept), set(captured.crosses)) == (12, {"weight"})
