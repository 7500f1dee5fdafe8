"""`prune(model, calibration=batches)` on models as callers have them, and on batches of several sizes."""

import functools

import pytest
import torch
from helpers.families import first_is_fast
from helpers.stacks import WANDA, Block, check_pruned, small, small_batches, weights_of
from helpers.tensors import assert_equal
from safetensors.torch import load_model
from torch import nn

from sparsefw import InputError, prune


@pytest.mark.parametrize("scale", [(-1, -1, 1), pytest.param((-1, 1, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize("shapes", [((2, 5), (2, 7), (2, 5)), ((1, 5), (2, 5), (1, 5), (2, 5))])
def test_each_batch_has_its_own_condition(shapes, scale):
    model, batches = small(), small_batches(*shapes)
    for batch in batches:
        size = [own if given == -1 else given for own, given in zip(batch["x"].shape, scale, strict=True)]
        batch["scale"] = torch.rand(size)
    check_pruned(model, batches)


def hooks(model):
    """Hooks of blocks run once for a block's own run."""
    first, last = model.blocks
    first.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    first.register_forward_hook(lambda module, args, output: output + 1)
    last.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | {"scale": 3}), with_kwargs=True)
    last.register_forward_hook(lambda module, args, kwargs, output: output.neg(), with_kwargs=True)
    last.register_forward_hook(lambda *given: None if given[2] is None else given[2] + 1, always_call=True)


def partial(model):
    """As accelerate's hooks, in the place of a block's forward."""

    def forward(block, *args, **kwargs):
        return args[0] - block.before(*args, **kwargs)

    for block in model.blocks:
        block.before = block.forward
        block.forward = functools.update_wrapper(functools.partial(forward, block), block.before)


def called_without_the_module(model):
    """The blocks' forward is called, and not they themselves."""

    class Bare(Block):
        def __call__(self, *args, **kwargs):
            return self.forward(*args, **kwargs)

    for block in model.blocks:
        block.__class__ = Bare


def nothing(model):
    """The model and its batches were made in inference mode, see below."""


def own(block):
    """What a caller may have put into a block."""
    hooks = [{**x} for name, x in vars(block).items() if name.endswith("_hooks")]
    return hooks, vars(block).get("forward"), block.fc1.weight


@pytest.mark.parametrize("options", [{}, {"reconstruct": 2}, {"compare": ("wanda",)}], ids=str)
@pytest.mark.parametrize("change", first_is_fast([hooks, partial, nothing, called_without_the_module], 3))
def test_what_a_caller_has_put_into_blocks_runs_and_stays(change, options):
    with torch.inference_mode(change is nothing):
        model, batches = small(), small_batches()
    change(model)
    before = [own(block) for block in model.blocks]
    check_pruned(model, batches, **options)
    for block, (hooks, forward, weight) in zip(model.blocks, before, strict=True):
        assert own(block)[:2] == (hooks, forward)
        assert block.fc1.weight is weight


def compiled(where):
    """A model with a part of it compiled, and compiled code that has run."""
    model = given = small()
    if where == "model":
        given = torch.compile(model, backend="eager")
    elif where == "model in place":
        model.compile(backend="eager")
    elif where == "blocks in place":
        model.blocks[0].compile(backend="eager")
    else:
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    with torch.no_grad():
        given(**small_batches((1, 3))[0])
    return given, model


@pytest.mark.parametrize("where", first_is_fast(["blocks", "model", "model in place", "blocks in place"]))
def test_names_of_a_compiled_model_are_its_own(where, out):
    given, model = compiled(where)
    parts = dict(given.named_modules())
    result = check_pruned(given, small_batches((2, 5)), output=out)
    assert [layer.name for layer in result.layers[::2]] == [f"blocks.{n}.fc1.weight" for n in (0, 1)]
    assert result.report.argument("model", str) == "Small"
    loaded = small()
    load_model(loaded, out / "model.safetensors")
    assert_equal(weights_of(model), weights_of(loaded))
    assert all(part is parts[name] for name, part in given.named_modules())


class Quantized(nn.Module):
    """A linear layer of bytes, or of integers that others pack."""

    def __init__(self, linear, parameter):
        super().__init__()
        values = (linear.weight.detach() * 100).to(torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False) if parameter else nn.Buffer(values.int())

    def forward(self, x):
        return x @ (self.weight.float() / 100).T


@pytest.mark.parametrize("parameter", [True, False])
def test_quantized_layers_stay_and_are_named(parameter):
    model, lines = small(), []
    for block in model.blocks:
        block.fc2 = Quantized(block.fc2, parameter)
    if parameter:
        # Nothing is left to prune in the last block.
        block.fc1 = Quantized(block.fc1, parameter)
    assert sorted(check_pruned(model, small_batches(), log=lines.append).report.kept_dense) == [
        "blocks.0.fc2.weight",
        *["blocks.1.fc1.weight"] * parameter,
        "blocks.1.fc2.weight",
    ]
    assert "note: kept dense in blocks.0 and blocks like it, since they are quantized: fc2.weight" in lines
    for block in model.blocks:
        block.fc1 = Quantized(block.fc1, parameter)
    with pytest.raises(InputError, match="; the model is quantized"):
        prune(model, calibration=small_batches(), **WANDA)


def test_a_quantized_model_is_refused_by_name():
    class Wrapper(torch.Tensor):
        """As those of torchao, which wrap the integers."""

        __tensor_flatten__ = __tensor_unflatten__ = None

    model = small()
    model.blocks[1].fc2.weight = nn.Parameter(model.blocks[1].fc2.weight.detach().as_subclass(Wrapper))
    with pytest.raises(InputError, match=r"^blocks.1.fc2.weight: is quantized or distributed \(Wrapper\)"):
        prune(model, calibration=small_batches(), **WANDA)
