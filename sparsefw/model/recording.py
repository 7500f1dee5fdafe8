"""How a model's blocks hand tensors on: nested values with what stands for their tensors, and the calls between blocks.

What blocks are given and return holds tensors inside lists, dicts and other objects.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.model import tape
from sparsefw.model.activations import Stored
from sparsefw.model.parts import UNSUPPORTED
from sparsefw.model.tape import name_of, tensors_in

# Values without parts: they are never changed.
_ATOMS: tuple[type, ...] = (type(None), type(...), int, float, complex, str, bytes, range, slice, frozenset, np.generic)
_ATOMS += (Enum, torch.dtype, torch.device, torch.layout, torch.Size)

# Parts of a nested value: a tensor, something without parts, something with parts, the number of one that was met, and
# the key under which the next part is found.
LEAF, ATOM, OBJECT, AGAIN, KEY = "leaf", "atom", "object", "again", "key"

# A mask that is added to scores hides what has less.
HIDDEN = -1e3

# An object that was met, by its id, and its stand-in. The object is held, so that no other one takes its id.
Memo = dict[int, tuple[Any, Any]]


@dataclass(frozen=True)
class _Numbered:
    """Stands for something, by its number."""

    number: int


class Constant(_Numbered):
    """Stands for a tensor that the model's forward makes before its first block, or an outside weight."""


class Value(_Numbered):
    """Stands for a tensor that a block returns, or that the model's forward makes of such tensors."""


class Box(_Numbered):
    """Stands for an object that several blocks are given, and may change."""


_LEAVES = (Tensor, Stored, tape.Value, _Numbered)


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
    return [part for kind, part, _ in _walk(value, {}) if kind is LEAF]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a nested value, in order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def numbers_in(value: Any) -> set[int]:
    """Numbers of the `Value`s in a nested value."""
    return {leaf.number for leaf in leaves_of(value) if isinstance(leaf, Value)}


def objects_of(value: Any) -> list[Any]:
    """The objects in a nested value that may be changed, the outer ones first."""
    return [part for kind, part, _ in _walk(value, {}) if kind is OBJECT and not isinstance(part, tuple)]


def outline(value: Any) -> list[Any]:
    """The parts of a nested value, for a comparison: equal outlines mean the same tensors in the same places.

    Functions of one name are equal: they may be made anew in each forward.
    """
    return [(kind, type(part), what) for kind, part, what in _walk(value, {})]


def _walk(value: Any, met: Memo) -> Iterator[tuple[str, Any, Any]]:
    """All parts of a nested value: the kind, the part, and what it is compared by; each behind its key."""
    if isinstance(value, _LEAVES):
        yield LEAF, value, id(value)
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


@dataclass
class Step:
    """A call of a torch function between two blocks.

    Attributes:
        function: the function.
        args, kwargs: its arguments, with `Constant`s and `Value`s.
        outputs: numbers of the tensors that it returns.
        in_place: whether it writes to its first argument, which is what it returns.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: list[int]
    in_place: bool = False

    def run(self, leaf: Callable[[Any], Tensor]) -> Iterable[tuple[int, Tensor]]:
        """Make the call with real tensors; the outputs with their numbers."""
        args = rebuilt(self.args, leaf)
        if self.in_place:
            args = (args[0].clone(), *args[1:])
        out = self.function(*args, **rebuilt(self.kwargs, leaf))
        return zip(self.outputs, tensors_in(out), strict=True)


def unpadded_of(masks: Iterable[Tensor]) -> Tensor | None:
    """The positions (batch, seqlen) that masks of attention do not hide from all others; None: all, or it is not known.

    Args:
        masks: (batch, seqlen) or (batch, ..., seqlen), true or not 0 where a position is seen, or what is added to
            scores, far below 0 where it is not.
    """
    found: Tensor | None = None
    for x in masks:
        seen = x > HIDDEN if x.is_floating_point() else x != 0
        seen = seen.flatten(1, -2).any(1) if x.dim() > 2 else seen
        found = seen if found is None else found & seen if found.shape == seen.shape else found
    return None if found is None or found.all() or not found.any() else found


def without_padding(x: Tensor, unpadded: Tensor | None) -> Tensor:
    """A tensor (batch, seqlen, d) or (seqlen, batch, d) with zeros at the positions of padding.

    A tensor of another form is returned as it is, and so is one with as many windows as tokens: which come first is not
    known of what lies inside a block, nor of tokens in one row.
    """
    for seen in () if unpadded is None or unpadded.shape == unpadded.T.shape else (unpadded, unpadded.T):
        if x.shape[:-1] == seen.shape:
            return x.masked_fill(~seen[..., None], 0)
    return x


@dataclass
class Call:
    """What the model's forward gives a block.

    Attributes:
        args, kwargs: the arguments beside the hidden states, with `Constant`s, `Value`s and `Box`es.
        steps: the calls between the block before and this one that something depends on.
        hidden: the hidden states: a `Value`, or a `Constant` where they do not come from the blocks before, as in the
            first block and in that of a decoder behind an encoder.
        outputs: numbers of the tensors that the block returns, the hidden states first.
        form: what the block returns, with `Value`s.
        after: the first number of what is made later.
        unpadded: (batch, seqlen) true at the positions that count; None: all do.
    """

    args: Any
    kwargs: Any
    steps: list[Step] = field(default_factory=list)
    hidden: Any = None
    outputs: list[int] = field(default_factory=list)
    form: Any = None
    after: int = 0
    unpadded: Tensor | None = None


@dataclass
class Recording:
    """How a model's blocks hand tensors on, as one forward has shown it.

    Attributes:
        calls: what each block is given, by its number, in the order of the calls.
        hidden: the input of the first block.
        live: by block, numbers of the tensors that are needed after the next block has begun, its hidden states aside.
        constants: the tensors for which `Constant`s stand.
        boxes: the objects that several blocks are given, as they are before the first block.
        of_batch: numbers of the constants that depend on what the forward is given.
        end: numbers of the tensors that are read behind the last block, beside its hidden states.
        batch_behind: whether what the forward is given is read behind the last block, too, or what is made of it.
        windows_first: whether hidden states are (windows, tokens, d); a model may have tokens first. Their shape does
            not tell where a micro-batch has as many windows as tokens.
    """

    calls: dict[int, Call]
    hidden: Tensor
    live: dict[int, list[int]]
    constants: list[Tensor] = field(default_factory=list)
    boxes: list[Any] = field(default_factory=list)
    of_batch: set[int] = field(default_factory=set)
    end: set[int] = field(default_factory=set)
    batch_behind: bool = False
    windows_first: bool = True

    @property
    def by_window(self) -> bool:
        """Whether what lies behind the last block can be run with each window by itself."""
        return self.windows_first and not self.end and not any(call.steps for call in self.calls.values())

    @property
    def divisible(self) -> bool:
        """Whether some windows of a micro-batch can be run by themselves: hidden states are all that a window has."""
        return self.windows_first and not (self.of_batch or self.boxes or any(self.live.values()))

    @cached_property
    def signature(self) -> list[Any]:
        """Equal signatures mean that the same tensors are handed on in the same way."""
        return [
            (
                numbers_in((x.hidden, x.args, x.kwargs)),
                x.outputs,
                [(name_of(step.function), step.outputs) for step in x.steps],
            )
            for x in self.calls.values()
        ]
