"""Gradients of slices of stacked weights are those that torch makes, and cost what the slices cost."""

import pytest
import torch
from helpers.families import TOKENS, save_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from sparsefw.model.slice_gradients import SliceGradients


class CountOfSize(TorchDispatchMode):
    """Counts the tensors of a size that operations make anew."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.size and not func.is_view:
            self.count += func._schema.name != "aten::add_"
        return out


@pytest.fixture
def stacked():
    return nn.Parameter(torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)))


def weighted(parameter: nn.Parameter, indices: list) -> torch.Tensor:
    """A loss that each slice enters in another way."""
    return sum((n + 1) * parameter[index].sin().sum() for n, index in enumerate(indices))


INDICES = {
    "an int": [1],
    "from the end": [-1, 4],
    "tensors": [torch.tensor(2), torch.tensor(0, dtype=torch.int32)],
    "the same twice": [3, 3, torch.tensor(3)],
    "a slice": [slice(1, 3)],
    "a tensor with an axis": [torch.tensor([2])],
    "a mask": [True],
    "a mask in a tensor": [torch.tensor(True)],
    "further axes": [(1, 2), (..., 0)],
    "a new axis": [None],
}


@pytest.mark.parametrize("name", INDICES)
def test_any_index(name, stacked):
    weighted(stacked, INDICES[name]).backward()
    expected, stacked.grad = stacked.grad, None
    with SliceGradients([stacked]) as slices:
        loss = weighted(stacked, INDICES[name])
    loss.backward(inputs=slices.leaves)
    torch.testing.assert_close(stacked.grad, expected, rtol=1e-6, atol=1e-7)


def test_whole_and_in_slices(stacked):
    def loss() -> torch.Tensor:
        return stacked.cos().sum() + weighted(stacked, [0, torch.tensor(4)])

    loss().backward()
    expected, stacked.grad = stacked.grad, None
    with SliceGradients([stacked]) as slices:
        value = loss()
    value.backward(inputs=slices.leaves)
    torch.testing.assert_close(stacked.grad, expected, rtol=1e-6, atol=1e-7)


def test_no_such_slice(stacked):
    with pytest.raises(IndexError), SliceGradients([stacked]):
        stacked[5]


def test_other_parameters_are_left_alone(stacked):
    matrix = nn.Parameter(torch.randn(5, 4))
    with SliceGradients([matrix]) as slices:
        loss = matrix[1].sum() + stacked[2].sum()
    assert slices.leaves == [matrix]
    loss.backward(inputs=slices.leaves)
    assert matrix.grad[1].eq(1).all()
    assert stacked.grad is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_torch(family, dtype, tmp_path):
    """For every expert with tokens and every other parameter; without tokens there are zeros."""
    folder = save_model(tmp_path, family, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager").eval()
    parameters = dict(model.model.layers.named_parameters())

    def loss() -> torch.Tensor:
        return model(TOKENS[:1, :3], use_cache=False).logits.float().square().mean()

    loss().backward(inputs=[*parameters.values()])
    expected = {name: parameter.grad for name, parameter in parameters.items()}
    model.zero_grad()
    with SliceGradients(parameters.values()) as slices:
        value = loss()
    assert len(slices.leaves) > len(parameters)
    value.backward(inputs=slices.leaves)
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, expected[name]), name
    assert any(not x.grad[e].any() for x in parameters.values() if x.dim() == 3 for e in range(len(x)))


def test_one_gradient_of_all_experts():
    """Where torch makes one for each of them."""
    parameter = nn.Parameter(torch.randn(16, 4, 3))
    with SliceGradients([parameter]) as slices, CountOfSize(parameter.numel()) as made:
        loss = weighted(parameter, [*range(16)])
        loss.backward(inputs=slices.leaves)
    assert made.count == 1
    with CountOfSize(parameter.numel()) as made:
        weighted(parameter, [*range(16)]).backward()
    assert made.count >= 16
