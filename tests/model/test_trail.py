"""Gradients go back through a model block by block as through the whole model."""

import pytest
import torch
from helpers.families import HANDING_ON, TOKENS, first_is_fast, save_model
from helpers.whole import streamed, whole_model
from torch import nn

from sparsefw.data.batches import token_batch
from sparsefw.model.forward import embed
from sparsefw.model.head import logits_of_batch
from sparsefw.model.trail import Trail

FAMILIES = ["llama", *HANDING_ON, "mixtral", "gemma2", "bloom", "gpt2"]


def matrices(model, i):
    """The names and parameters of an open block's matrices, by the names of the whole model."""
    block = model.blocks[i]
    return {f"{model.names[i]}.{name}": x for name, x in block.named_parameters() if x.dim() >= 2}


def gradients_of(folder, reruns):
    """The loss, and the gradients of all blocks' matrices."""
    with streamed(folder) as model, model.outside_loaded(), model.whole():
        states, owners = embed(model, TOKENS[:2], 1), {}
        for i in model.unique_blocks:
            owners |= {name: nn.Parameter.requires_grad_(x) for name, x in matrices(model, i).items()}
        trail = Trail(states, 1, [*owners.values()], reruns)
        graph, hidden, others = trail.end()
        loss = logits_of_batch(model, token_batch(TOKENS[1:2]), hidden, others).square().mean()
        gradients = {}
        graph.pull_back([(loss, torch.ones(()))], gradients)
        for i in reversed(range(len(model.blocks))):
            trail.pull_back(i, gradients)
        # Nobody reads the rest.
        found = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in owners.items()}
        whole = whole_model(model, folder)
    return loss.detach(), found, whole


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_gradients_are_those_of_the_whole_model(family, tmp_path):
    """With graphs that stay the bits are those of blocks that run again."""
    folder = save_model(tmp_path, family)
    loss, found, whole = gradients_of(folder, reruns=False)
    again, rerun, _ = gradients_of(folder, reruns=True)
    assert torch.equal(loss, again)
    assert all(torch.equal(x, rerun[name]) for name, x in found.items())
    expected = whole(TOKENS[1:2], use_cache=False).logits.square().mean()
    torch.testing.assert_close(loss, expected.detach())
    parameters = dict(whole.named_parameters())
    exact = torch.autograd.grad(expected, [parameters[name] for name in found], allow_unused=True)
    assert any(x is not None for x in exact)
    for (name, x), truth in zip(found.items(), exact, strict=True):
        truth = torch.zeros_like(x) if truth is None else truth
        assert (x - truth).abs().max() <= 1e-5 * truth.abs().max(), name
