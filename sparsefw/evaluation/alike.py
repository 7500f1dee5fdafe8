"""Which blocks of a model differ, so that a trial of one block of each kind is a trial of all.

Blocks are alike if they are of one class with parameters of the same shapes, have the same settings, and are given the
same masks. A model may keep the type of each layer in a list of its config, or in an attribute of the layer.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model import BlockModel, HiddenStates
from sparsefw.model.flow import Call, name_of
from sparsefw.model.values import Constant, leaves_of, outline, rebuilt

# Types of settings. A floating-point number, such as a scale, does not tell what a token reads.
_SETTINGS = (bool, int, str, torch.dtype, Enum, type(None))


def different_blocks(model: BlockModel, states: HiddenStates) -> list[int]:
    """The first block of every kind.

    Args:
        model: the model.
        states: hidden states before the first block.
    """
    firsts: list[int] = []
    lists = _lists_of_layers(model)
    for i in range(len(model.blocks)):
        if not any(_alike(model, states, lists, first, i) for first in firsts):
            firsts.append(i)
    return firsts


def _alike(model: BlockModel, states: HiddenStates, lists: list[Any], one: int, other: int) -> bool:
    blocks, calls = model.blocks, [states.calls[0][i] for i in (one, other)]
    steps, given = [[name_of(step.function) for step in call.steps] for call in calls], [*map(_form, calls)]
    return (
        model.kinds[one] == model.kinds[other]
        and all(values[one] == values[other] for values in lists)
        and steps[0] == steps[1]
        and all(_same_setting(*pair, other - one) for pair in _settings(blocks[one], blocks[other]))
        and given[0] == given[1]
        and all(map(_same_mask, *(_constants(states, call) for call in calls)))
    )


def _lists_of_layers(model: BlockModel) -> list[Any]:
    """The lists of the model's config that have an entry for each block, such as the types of layers."""
    config = getattr(model.runs, "config", None)
    values = vars(config.get_text_config()).values() if config else ()
    return [value for value in values if isinstance(value, list | tuple) and len(value) == len(model.blocks)]


def _settings(one: nn.Module, other: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Pairs of settings of two blocks' modules."""
    for a, b in zip(one.modules(), other.modules(), strict=False):
        yield type(a).__qualname__, type(b).__qualname__
        for name in sorted(vars(a).keys() | vars(b).keys()):
            values = vars(a).get(name), vars(b).get(name)
            if all(isinstance(value, _SETTINGS) for value in values):
                yield values


def _same_setting(one: Any, other: Any, apart: int) -> bool:
    """Whether two settings are the same, or the numbers of two blocks that are so far apart."""
    return one == other or (type(one) is type(other) is int and other - one == apart)


def _form(call: Call) -> list[Any]:
    """The arguments of a block, without the values of tensors."""
    return outline(rebuilt((call.args, call.kwargs), lambda leaf: type(leaf).__name__), by_name=True)


def _constants(states: HiddenStates, call: Call) -> list[Tensor]:
    """The tensors that a block is given and that are made before the first block."""
    leaves = leaves_of((call.args, call.kwargs))
    return [states.constants[0][leaf.number].read() for leaf in leaves if isinstance(leaf, Constant)]


def _same_mask(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one form, and equal if they may be masks: the values of others do not matter."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return (one.is_floating_point() and one.dim() < 4) or torch.equal(one, other)
