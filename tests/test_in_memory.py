"""`prune(model, calibration=batches)` on models as callers have them, and on batches of several sizes."""

import functools

import pytest
import torch
from helpers.families import first_is_fast
from helpers.stacks import perplexity_of_whole
from safetensors.torch import load_model
from torch import nn

from sparsefw import prune
from sparsefw.data.batches import BATCHES

QUICK = dict(kernel="torch", steps=3, refit=2, rounds=0, reconstruct=0, sparsity="0.5")


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
    found = result.perplexity[BATCHES]
    assert found["dense"] == pytest.approx(dense, rel=1e-5)
    assert found["sparsefw"] == pytest.approx(perplexity_of_whole(model, batches), rel=1e-5)
    for layer in result.report.layers_of("sparsefw"):
        assert ((_weight(model, layer.name) != 0).sum(1) <= layer.shape[1] // 2).all()
    return result


def _weight(model, name):
    """The weight of this name, whatever is wrapped around the modules."""
    return {key.replace("_orig_mod.", ""): x for key, x in model.named_parameters()}[name.replace("_orig_mod.", "")]


@pytest.mark.parametrize("scale", [(-1, -1, 1), pytest.param((-1, 1, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize("shapes", [((2, 5), (2, 7), (2, 5)), ((1, 5), (2, 5), (1, 5), (2, 5))])
def test_each_has_its_own_condition(shapes, scale):
    model, batches = made(), batches_like(*shapes)
    for batch in batches:
        size = [own if given == -1 else given for own, given in zip(batch["x"].shape, scale, strict=True)]
        batch["scale"] = torch.rand(size)
    check(model, batches)


class TestHooks:
    """Hooks of blocks run once for a block's own run, as in the model."""

    @pytest.mark.parametrize("options", [{}, {"reconstruct": 2}, {"compare": ("wanda",)}], ids=str)
    def test_of_blocks(self, options):
        model, batches = made(), batches_like((2, 5), (2, 5))
        first, last = model.blocks
        first.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
        first.register_forward_hook(lambda module, args, output: output + 1)
        last.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | {"scale": 3}), with_kwargs=True)
        last.register_forward_hook(lambda module, args, kwargs, output: output.neg(), with_kwargs=True)
        last.register_forward_hook(lambda *given: None if given[2] is None else given[2] + 1, always_call=True)
        before = [[dict(x) for x in vars(block).values() if isinstance(x, dict)] for block in model.blocks]
        check(model, batches, **options)
        for block, hooks in zip(model.blocks, before, strict=True):
            for now, known in zip((x for x in vars(block).values() if isinstance(x, dict)), hooks, strict=True):
                assert now.keys() == known.keys()


class Forwards:
    """What stands in the place of a block's forward, by kind; all do the same."""

    @staticmethod
    def partial(block):
        """As accelerate's hooks."""
        block.before = block.forward

        def forward(block, *args, **kwargs):
            return args[0] - block.before(*args, **kwargs)

        return functools.update_wrapper(functools.partial(forward, block), block.before)

    @staticmethod
    def closure(block):
        before = block.forward
        return lambda *args, **kwargs: args[0] - before(*args, **kwargs)


def replaced(kind):
    model = made()
    for block in model.blocks:
        block.forward = getattr(Forwards, kind)(block)
    return model


class TestOwnForward:
    @pytest.mark.parametrize("options", [{}, {"reconstruct": 2}, {"compare": ("wanda",)}], ids=str)
    @pytest.mark.parametrize("kind", first_is_fast(["partial", "closure"]))
    def test_is_run_and_stays(self, kind, options):
        model = replaced(kind)
        own = [block.forward for block in model.blocks]
        check(model, batches_like((2, 5), (2, 5)), **options)
        assert all(block.forward is forward for block, forward in zip(model.blocks, own, strict=True))

    @pytest.mark.parametrize("options", [{}, {"reconstruct": 2}], ids=str)
    def test_may_be_called_without_the_module(self, options, monkeypatch):
        monkeypatch.setattr(Block, "__call__", lambda block, *args, **kwargs: block.forward(*args, **kwargs))
        check(made(), batches_like((2, 5), (2, 5)), **options)


def compiled(where):
    """A model with a part of it compiled, and compiled code that has run."""
    model = given = made()
    if where == "model":
        given = torch.compile(model, backend="eager")
    elif where == "model in place":
        model.compile(backend="eager")
    elif where == "blocks in place":
        model.blocks[0].compile(backend="eager")
    else:
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    with torch.no_grad():
        given(**batches_like((1, 3))[0])
    return given, model


@pytest.mark.parametrize("where", first_is_fast(["blocks", "model", "model in place", "blocks in place"]))
def test_names_are_those_of_the_model_itself(where, tmp_path):
    given, model = compiled(where)
    parts = dict(given.named_modules())
    result = check(given, batches_like((2, 5)), output=tmp_path / "out")
    assert [layer.name for layer in result.layers[::2]] == [f"blocks.{n}.fc1.weight" for n in (0, 1)]
    assert result.report.argument("model", str) == "Stack"
    loaded = made()
    load_model(loaded, tmp_path / "out" / "model.safetensors")
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(part is parts[name] for name, part in given.named_modules())


@pytest.mark.parametrize("options", [{}, {"reconstruct": 2}], ids=str)
def test_model_and_batches_made_in_it(options):
    with torch.inference_mode():
        model, batches = made(), batches_like((2, 5), (2, 5))
    weights = [block.fc1.weight for block in model.blocks]
    check(model, batches, **options)
    assert all(block.fc1.weight is weight for block, weight in zip(model.blocks, weights, strict=True))
