"""A copy of a block, which stays dense while the block is pruned."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.block_model import BlockModel


def copy_of_block(model: BlockModel, i: int) -> nn.Module:
    """A copy of block i, which is open. What lies outside of the block is not copied, though the block may refer to it.

    Raises:
        InputError: the block holds something that cannot be copied, as a lock; or a function in the place of a module's
            forward would run the block itself, and not the copy.
    """
    block, name = model.blocks[i], model.names[i]
    for inner, module in block.named_modules(prefix=name):
        if "forward" in vars(module) and _holds_module(vars(module)["forward"]):
            raise InputError(
                f"{inner}: a function that stands in the place of its forward holds a module itself, so that the block "
                "cannot be copied; let it take the module as its first argument, and bind it with types.MethodType"
            )
    inside = set(block.modules())
    outside = {id(module): module for module in model.model.modules() if module not in inside}
    try:
        return copy.deepcopy(block, outside)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"{name}: cannot be copied, for dense outputs to compare with: {shown(first_line(error))}; take off the "
            "block what cannot be copied, until the model is pruned"
        ) from error


def _holds_module(forward: Callable[..., Any]) -> bool:
    """Whether a function holds a module, or a method of one, in what it closes over or in its defaults.

    A copy of a bound method or of functools.partial is made with a copy of the module. A function is never copied.
    """
    function = getattr(forward, "__func__", getattr(forward, "func", forward))
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    held += getattr(function, "__defaults__", None) or ()
    return any(isinstance(getattr(x, "__self__", x), nn.Module) for x in held)
