"""Gradients of slices of stacked weights are those that torch makes, and cost what the slices cost."""

import pytest
import torch
from helpers.families import TOKENS, save_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from sparsefw.model.gradients import SliceGradients


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


INDICES = {
    "ints": [1, -1, 4],
    "tensors": [torch.tensor(2), torch.tensor(0, dtype=torch.int32)],
    "the same twice": [3, 3, torch.tensor(3)],
    "slices": [slice(1, 3), slice(2, 5), slice(0, 5, 2)],
    "a tensor with an axis": [torch.tensor([2])],
    "masks": [True, torch.tensor(True)],
    "further axes": [(1, 2), (..., 0), (slice(None), 3)],
    "a new axis": [None, (1, None)],
}

# Other ways to take parts, of the parameter or of views of it.
WAYS = {
    "select": lambda w: [w.select(0, 1), torch.select(w, 1, 2)],
    "narrow": lambda w: [w.narrow(1, 1, 2), torch.narrow(w, 0, 3, 2)],
    "by name": lambda w: [torch.select(input=w, dim=0, index=1)],
    "of a view": lambda w: [w.view(20, 3)[4:8], w.flatten(0, 1).unflatten(0, (5, 4))[2], w.transpose(0, 2)[1]],
    "of a part": lambda w: [w[1:4][1], w[2][3][:2]],
    "in parts": lambda w: [*w.chunk(5), *w.unbind(1)],
    "without gradients": lambda w: [w[0] * w[1].detach()],
}


def check(stacked: nn.Parameter, loss) -> SliceGradients:
    """The gradient is that of torch."""
    loss().backward()
    expected, stacked.grad = stacked.grad, None
    with SliceGradients([stacked]) as slices:
        value = loss()
    value.backward(inputs=slices.leaves)
    torch.testing.assert_close(stacked.grad, expected, rtol=1e-6, atol=1e-7)
    return slices


WAYS |= {name: lambda w, indices=indices: [w[index] for index in indices] for name, indices in INDICES.items()}
WAYS["whole and in slices"] = lambda w: [w, w[0], w[torch.tensor(4)]]


@pytest.mark.parametrize("name", WAYS)
def test_gradients_are_those_of_torch(name, stacked):
    check(stacked, lambda: sum((n + 1) * part.sin().sum() for n, part in enumerate(WAYS[name](stacked))))


def test_other_parameters_are_left_alone(stacked):
    matrix = nn.Parameter(torch.randn(5, 4))
    with SliceGradients([matrix]) as slices:
        loss = matrix[1].sum() + stacked[2].sum()
    assert [leaf.shape for leaf in slices.leaves] == [(5, 4), (4,)]
    loss.backward(inputs=slices.leaves)
    assert matrix.grad[1].eq(1).all()
    assert stacked.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_torch(dtype, tmp_path):
    """For every expert with tokens and every other parameter; without tokens there are zeros."""
    folder = save_model(tmp_path, "mixtral", dtype)
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
        loss = sum(parameter[e].sin().sum() for e in range(16))
        loss.backward(inputs=slices.leaves)
    assert made.count == 1
