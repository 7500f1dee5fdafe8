"""Nested values: what blocks are given and return, with tensors inside lists, dicts and other objects."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.model import tape
from sparsefw.model.activations import Stored
from sparsefw.model.parts import UNSUPPORTED

# Values without parts: they are never changed.
_ATOMS = (
    type(None),
    type(...),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    frozenset,
    np.generic,
    Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.Size,
)

# An object that was met, by its id, and its stand-in. The object is held, so that no other one takes its id.
Memo = dict[int, tuple[Any, Any]]


@dataclass(frozen=True)
class Constant:
    """Stands for a tensor that the model's forward makes before its first block, or an outside weight."""

    number: int


@dataclass(frozen=True)
class Value:
    """Stands for a tensor that a block returns, or that the model's forward makes of such tensors."""

    number: int


@dataclass(frozen=True)
class Box:
    """Stands for an object that several blocks are given, and may change."""

    number: int


_LEAVES = (Tensor, Stored, tape.Value, Constant, Value, Box)


def is_atom(value: Any) -> bool:
    """Whether a value has no parts. Functions, classes and modules count as atoms: they are not changed.

    Raises:
        InputError: it may have parts, but which ones is not known, as in a set or an array.
    """
    if isinstance(value, _ATOMS) or callable(value):
        return True
    if not hasattr(value, "__dict__") and not isinstance(value, list | tuple | dict):
        raise InputError(f"{UNSUPPORTED}: its blocks are given or return a {type(value).__name__}")
    return False


def rebuilt(value: Any, leaf: Callable[[Any], Any], memo: Memo | None = None) -> Any:
    """A copy of a nested value with other leaves. Parts that were one object are one object in the copy.

    Args:
        value: the value.
        leaf: called with each tensor, or what stands for one; returns what takes its place.
        memo: what stands for objects that are known; the new ones are added.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][1]
    if isinstance(value, _LEAVES):
        return leaf(value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [rebuilt(item, leaf, memo) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_atom(value):
        return value
    new = copy.copy(value)
    # Before its parts, which may hold it.
    memo[id(value)] = value, new
    if isinstance(value, list):
        new[:] = [rebuilt(item, leaf, memo) for item in value]
    elif isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(new, key, rebuilt(item, leaf, memo))
    for name, item in getattr(value, "__dict__", {}).items():
        new.__dict__[name] = rebuilt(item, leaf, memo)
    return new


def leaves_of(value: Any) -> list[Any]:
    """The tensors in a nested value, or what stands for them, in order."""
    found: list[Any] = []
    rebuilt(value, found.append)
    return found


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a nested value, in order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def numbers_in(value: Any) -> set[int]:
    """Numbers of the `Value`s in a nested value."""
    return {leaf.number for leaf in leaves_of(value) if isinstance(leaf, Value)}


def objects_of(value: Any) -> list[Any]:
    """The objects in a nested value that may be changed, the outer ones first."""
    memo: Memo = {}
    rebuilt(value, lambda leaf: leaf, memo)
    return [known for known, _ in memo.values()]


def outline(value: Any) -> list[Any]:
    """The parts of a nested value, for a comparison: equal outlines mean the same tensors in the same places.

    Functions of one name are equal: they may be made anew in each forward.
    """
    return list(_parts(value, {}))


def _parts(value: Any, known: Memo) -> Iterator[Any]:
    if isinstance(value, _LEAVES):
        yield "tensor", id(value)
    elif id(value) in known:
        yield "again", known[id(value)][1]
    elif is_atom(value):
        yield type(value), value if isinstance(value, _ATOMS) else getattr(value, "__qualname__", "")
    else:
        known[id(value)] = value, len(known)
        yield type(value), len(value) if hasattr(value, "__len__") else 0
        for item in value if isinstance(value, list | tuple) else ():
            yield from _parts(item, known)
        for items in (value if isinstance(value, dict) else {}, getattr(value, "__dict__", {})):
            for name, item in items.items():
                yield name
                yield from _parts(item, known)
