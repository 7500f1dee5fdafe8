"""`prune(model, calibration=batches)` on models as callers have them, and on batches of several sizes."""

import pytest
import torch
from helpers.stacks import perplexity_of_whole
from torch import nn

from sparsefw import prune
from sparsefw.data import BATCHES
from sparsefw.model.activations import DeviceActivations, FiledActivations
from sparsefw.model.carried import Constants

QUICK = dict(kernel="torch", steps=3, refit=2, rounds=0, reconstruct=0, sparsity="0.5")
CPU = torch.device("cpu")


class Block(nn.Module):
    """An MLP that may be scaled."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x, scale=None):
        y = self.fc2(self.act(self.fc1(x)))
        return x + (y if scale is None else y * scale)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, target, scale=None):
        for block in self.blocks:
            x = block(x, scale=scale)
        return {"loss": (x - target).square().mean()}


def made():
    torch.manual_seed(0)
    return Stack().eval()


def batches_like(*shapes):
    return [{"x": torch.randn(*shape, 8), "target": torch.randn(*shape, 8)} for shape in shapes]


def check(model, batches, **options):
    """Prune a model; the report has to be of the model itself."""
    dense = perplexity_of_whole(model, batches)
    result = prune(model, calibration=batches, evaluate=batches, **QUICK | options)
    assert result.perplexity[BATCHES] == {
        "dense": pytest.approx(dense, rel=1e-5),
        "sparsefw": pytest.approx(perplexity_of_whole(model, batches), rel=1e-5),
    }
    for layer in result.layers:
        assert ((model.get_parameter(layer.name) != 0).sum(1) <= layer.shape[1] // 2).all()
    return result


class TestBatchesOfSeveralSizes:
    @pytest.mark.parametrize("scale", [(-1, -1, 1), (-1, 1, 8)])
    @pytest.mark.parametrize("shapes", [((2, 5), (2, 7), (2, 5)), ((1, 5), (2, 5), (1, 5), (2, 5))])
    def test_each_has_its_own_condition(self, shapes, scale):
        model, batches = made(), batches_like(*shapes)
        for batch in batches:
            size = [own if given == -1 else given for own, given in zip(batch["x"].shape, scale, strict=True)]
            batch["scale"] = torch.rand(size)
        check(model, batches)

    @pytest.mark.parametrize("make", [DeviceActivations, lambda: FiledActivations(CPU, None)])
    @pytest.mark.parametrize("forms", ["aab", "aba", "abA", "aaAb", "abcA", "aAbB", "at", "abt"])
    def test_constants(self, forms, make):
        torch.manual_seed(0)
        drawn = {
            "a": torch.randn(2, 5), "A": torch.randn(2, 5), "b": torch.randn(2, 7), "B": torch.randn(2, 7),
            "c": torch.randn(5), "t": torch.randn(5, 2).T,
        }  # fmt: skip
        constants = Constants(make)
        for form in forms:
            constants.append([drawn[form].clone(), torch.ones(3)], {0})
        for j, form in enumerate(forms):
            assert torch.equal(constants[j, 0], drawn[form])
            assert constants[j, 0].stride() == drawn[form].stride()
            assert torch.equal(constants[j, 1], torch.ones(3))
        constants.close()
