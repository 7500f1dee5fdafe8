"""Nested values, which blocks are given and return: tensors inside of tuples, lists, dicts and other objects.

References take the place of tensors in them.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.model.activations import Stored
from sparsefw.model.partial_forward import UNSUPPORTED
from sparsefw.model.tape import TapeValue

# Values without parts: they are never changed.
_ATOMS: tuple[type, ...] = (type(None), type(...), int, float, complex, str, bytes, range, slice, frozenset, np.generic)
_ATOMS += (Enum, torch.dtype, torch.device, torch.layout, torch.Size)

# Parts of a nested value: a tensor, a value without parts, one with parts, one that was met before, and the key of the
# next part.
LEAF, ATOM, OBJECT, AGAIN, KEY = "leaf", "atom", "object", "again", "key"

# Copies by the ids of what they are copies of. The original is held, so that no other object takes its id.
Memo = dict[int, tuple[Any, Any]]


@dataclass(frozen=True)
class _Reference:
    """A number that takes the place of something in a nested value."""

    number: int


class ConstantRef(_Reference):
    """Reference to a tensor that the model's forward makes without its blocks, or to a weight outside of them."""


class ValueRef(_Reference):
    """Reference to a tensor that a block returns, or that the model's forward makes of such tensors."""


class ObjectRef(_Reference):
    """Reference to an object that several blocks are given, and may change."""


_LEAVES = (Tensor, Stored, TapeValue, _Reference)


def is_atom(value: Any) -> bool:
    """Whether a value has no parts. Functions, classes and modules count as atoms: they are not changed.

    Raises:
        InputError: it may have parts, but they cannot be found, as in a set or an array.
    """
    if isinstance(value, _ATOMS) or callable(value):
        return True
    if not hasattr(value, "__dict__") and not isinstance(value, list | tuple | dict):
        raise InputError(f"{UNSUPPORTED}: its blocks are given or return a {type(value).__name__}")
    return False


def rebuilt(value: Any, leaf: Callable[[Any], Any], memo: Memo | None = None) -> Any:
    """Copy a nested value with other leaves. Parts that were one object are one object in the copy.

    Args:
        value: the value.
        leaf: called with each tensor or reference; returns the replacement.
        memo: copies of objects that are known; new ones are added.
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
    """List the tensors and references in a nested value, in order."""
    return [part for kind, part, _ in _walk(value, {}) if kind is LEAF]


def tensors_of(value: Any) -> list[Tensor]:
    """List the tensors in a nested value, in order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def numbers_in(value: Any, kind: type[_Reference] = ValueRef) -> set[int]:
    """The numbers of the references of a kind in a nested value."""
    return {leaf.number for leaf in leaves_of(value) if isinstance(leaf, kind)}


def objects_of(value: Any) -> list[Any]:
    """List the objects in a nested value that may be changed, the outer ones first."""
    return [part for kind, part, _ in _walk(value, {}) if kind is OBJECT and not isinstance(part, tuple)]


def outline(value: Any, leaf: Callable[[Any], Any] = id) -> list[Any]:
    """List the parts of a nested value for a comparison with those of another one.

    Equal outlines mean the same tensors in the same places. Functions of one name are equal: a forward may make them
    anew each time.

    Args:
        value: the value.
        leaf: called with each tensor or reference; returns what it is compared by.
    """
    return [(kind, leaf(part)) if kind is LEAF else (kind, type(part), what) for kind, part, what in _walk(value, {})]


def _walk(value: Any, met: Memo) -> Iterator[tuple[str, Any, Any]]:
    """Yield the kind of each part of a nested value, the part, and what it is compared by."""
    if isinstance(value, _LEAVES):
        yield LEAF, value, None
    elif id(value) in met:
        yield AGAIN, value, met[id(value)][1]
    elif is_atom(value):
        yield ATOM, value, value if isinstance(value, _ATOMS) else getattr(value, "__qualname__", "")
    else:
        if not isinstance(value, tuple):
            met[id(value)] = value, len(met)
        yield OBJECT, value, len(value) if hasattr(value, "__len__") else 0
        items = (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list | tuple) else ())
        )
        for key, item in (*items, *getattr(value, "__dict__", {}).items()):
            yield KEY, key, key
            yield from _walk(item, met)
