"""Copies of blocks, which run apart from them."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from sparsefw.errors import InputError


def copy_of(block: nn.Module, name: str) -> nn.Module:
    """A copy of a block with weights of its own.

    Args:
        block: the block.
        name: its name, for the message.

    Raises:
        InputError: a function in the place of a module's forward would run the block itself, and not the copy.
    """
    for inner, module in block.named_modules(prefix=name):
        if "forward" in vars(module) and _holds_module(vars(module)["forward"]):
            raise InputError(
                f"{inner}: a function that stands in the place of its forward holds a module itself, so that the block "
                "cannot be copied; let it take the module as its first argument, and bind it with types.MethodType"
            )
    return copy.deepcopy(block)


def _holds_module(forward: Callable[..., Any]) -> bool:
    """Whether a function holds a module, or a method of one, in what it closes over or in its defaults.

    A copy of a bound method or of functools.partial is made with a copy of the module. A function is never copied.
    """
    function = getattr(forward, "__func__", getattr(forward, "func", forward))
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    held += getattr(function, "__defaults__", None) or ()
    return any(isinstance(getattr(x, "__self__", x), nn.Module) for x in held)
