"""Gradients of slices of stacked weights are those that torch makes, and cost what the slices cost."""

import pytest
import torch
from helpers.families import TOKENS, save_model
from torch import nn
from transformers import AutoModelForCausalLM

from sparsefw.model.gradients import SliceGradients


@pytest.fixture
def stacked():
    return nn.Parameter(torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)))


# Ways to take parts, of the parameter or of views of it.
WAYS = {
    "ints": lambda w: [w[1], w[-1], w[4]],
    "tensors": lambda w: [w[torch.tensor(2)], w[torch.tensor(0, dtype=torch.int32)]],
    "the same twice": lambda w: [w[3], w[3], w[torch.tensor(3)]],
    "slices": lambda w: [w[1:3], w[2:5], w[0:5:2]],
    "masks and a tensor with an axis": lambda w: [w[True], w[torch.tensor(True)], w[torch.tensor([2])]],
    "further axes": lambda w: [w[1, 2], w[..., 0], w[:, 3], w[None], w[1, None]],
    "select": lambda w: [w.select(0, 1), torch.select(w, 1, 2), torch.select(input=w, dim=0, index=1)],
    "narrow": lambda w: [w.narrow(1, 1, 2), torch.narrow(w, 0, 3, 2)],
    "of a view": lambda w: [w.view(20, 3)[4:8], w.flatten(0, 1).unflatten(0, (5, 4))[2], w.transpose(0, 2)[1]],
    "of a part": lambda w: [w[1:4][1], w[2][3][:2]],
    "in parts": lambda w: [*w.chunk(5), *w.unbind(1)],
    "without gradients": lambda w: [w[0] * w[1].detach()],
    "whole and in slices": lambda w: [w, w[0], w[torch.tensor(4)]],
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_torch(way, stacked):
    def loss():
        return sum((n + 1) * part.sin().sum() for n, part in enumerate(WAYS[way](stacked)))

    loss().backward()
    expected, stacked.grad = stacked.grad, None
    with SliceGradients([stacked]) as slices:
        value = loss()
    value.backward(inputs=slices.leaves)
    torch.testing.assert_close(stacked.grad, expected, rtol=1e-6, atol=1e-7)


def test_other_parameters_are_left_alone(stacked):
    matrix = nn.Parameter(torch.randn(5, 4))
    with SliceGradients([matrix]) as slices:
        loss = matrix[1].sum() + stacked[2].sum()
    assert [leaf.shape for leaf in slices.leaves] == [(5, 4), (4,)]
    loss.backward(inputs=slices.leaves)
    assert matrix.grad[1].eq(1).all()
    assert stacked.grad is None


def test_the_same_bits_as_torch(tmp_path):
    """For every expert with tokens and every other parameter; without tokens there are zeros."""
    folder = save_model(tmp_path, "mixtral", torch.bfloat16)
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


def test_one_gradient_of_all_experts(stacked):
    """Where torch makes one for each of them."""
    with SliceGradients([stacked]) as slices:
        loss = sum(stacked[e].sin().sum() for e in range(5))
    loss.backward(inputs=slices.leaves)
    assert len(slices.leaves) == 6
    assert all(x.grad.data_ptr() == stacked.grad[e].data_ptr() for e, x in enumerate(slices.leaves[1:]))
