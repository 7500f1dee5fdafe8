"""Nested values: tensors inside tuples, lists, dicts and other objects, as blocks take and return them.

In a trace, references take the place of the tensors.
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

# Types of immutable values without parts.
_ATOMS: tuple[type, ...] = (type(None), type(...), int, float, complex, str, bytes, range, slice, frozenset, np.generic)
_ATOMS += (Enum, torch.dtype, torch.device, torch.layout, torch.Size)

# Kinds of parts of a nested value: a tensor or reference, a value without parts, a value with parts, an object that was
# visited before, and a key (the next part is the key's item).
LEAF, ATOM, OBJECT, AGAIN, KEY = "leaf", "atom", "object", "again", "key"

# Maps id(original) to (original, copy). It holds the original, so that no other object gets the same id.
Memo = dict[int, tuple[Any, Any]]


@dataclass(frozen=True)
class _Reference:
    """A number in place of a tensor or an object in a nested value."""

    number: int


class ConstantRef(_Reference):
    """Reference to a constant: a tensor that does not depend on blocks' outputs, such as a mask or a weight."""


class ValueRef(_Reference):
    """Reference to a followed tensor: one that a block returns, or that the forward computes from such tensors."""


class ObjectRef(_Reference):
    """Reference to an object that several blocks get as an argument, and may change."""


_LEAVES = (Tensor, Stored, TapeValue, _Reference)


def is_atom(value: Any) -> bool:
    """Whether a value has no parts (is an atom). Functions, classes and modules also count as atoms.

    Raises:
        InputError: the value has a type whose parts cannot be found, such as a set.
    """
    if isinstance(value, _ATOMS) or callable(value):
        return True
    if not hasattr(value, "__dict__") and not isinstance(value, list | tuple | dict):
        raise InputError(f"{UNSUPPORTED}: its blocks take or return a {type(value).__name__}")
    return False


def rebuilt(value: Any, leaf: Callable[[Any], Any], memo: Memo | None = None) -> Any:
    """Copy a nested value with other leaves. An object that occurs twice in the value is copied once.

    Args:
        value: the value.
        leaf: called with each tensor or reference; returns the replacement.
        memo: copies of objects that have been made before; the copies made here are added.
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
    # Registered before the parts are copied, since a part may refer back to this object.
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
    """List the mutable objects in a nested value, outer objects first."""
    return [part for kind, part, _ in _walk(value, {}) if kind is OBJECT and not isinstance(part, tuple)]


def outline(value: Any, leaf: Callable[[Any], Any] = id) -> list[Any]:
    """List the parts of a nested value, so that two values can be compared by their lists.

    Equal lists mean the same structure with equal leaves. Functions are compared by name, since a forward may define a
    function anew in each run.

    Args:
        value: the value.
        leaf: called with each tensor or reference; returns the key by which leaves are compared.
    """
    return [(kind, leaf(part)) if kind is LEAF else (kind, type(part), what) for kind, part, what in _walk(value, {})]


def _walk(value: Any, met: Memo) -> Iterator[tuple[str, Any, Any]]:
    """Yield for each part of a nested value its kind, the part, and a key by which parts are compared."""
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
