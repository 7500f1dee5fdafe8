"""Trace a block's forward: which call made a tensor, and which calls read it.

A tensor is enough to go on from, if no later call reads anything that was made before it. A cut is such a tensor that
has the form of the hidden states: the sum behind the attention is one in most models. It can take the block's input's
place, and later layers need no more of the block than what lies behind it.
"""

import weakref
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.layers.names import WeightNames, is_expert
from sparsefw.model.layers.products import products_of
from sparsefw.model.operands import tensors_in
from sparsefw.model.parts import INPUT, SAME, NumberedCalls, Point

# Stands for the block's caller, who reads its output after all calls.
_CALLER = 1 << 60

# Functions that read values of a tensor, by name. What a block does behind them may depend on what they read.
_VALUES = {"__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "item", "tolist", "numpy"}
_VALUES |= {"equal", "allclose", "is_nonzero", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"}

# Functions that attention calls, by name.
_ATTENTION = {"scaled_dot_product_attention", "softmax"}


@dataclass(frozen=True)
class Use:
    """A call that multiplies with a layer.

    Attributes:
        layer: name of the layer.
        call: number of the call.
        made: the point of its input, (..., in); None if that is not known, the input was written to after it was made,
            or the call is no product of this layer alone.
    """

    layer: str
    call: int
    made: Point | None


class Trace(NumberedCalls):
    """Records the calls of one micro-batch's forward through a block.

    Args:
        block: the block.
        hidden: the block's input.
        experts: as for `WeightNames`.

    Attributes:
        uses: the calls that multiply with a layer, selected or not.
        attention: number of the first call that mixes tokens by attention; None if there is none.
        experts: see `WeightNames`.
        signature: function and form of the output of every call. Equal signatures mean equal traces.
    """

    def __init__(self, block: nn.Module, hidden: Tensor, experts: frozenset[str] | None = None) -> None:
        super().__init__()
        self._names = WeightNames(block, experts)
        self.experts = self._names.experts
        self._form = hidden.shape, hidden.dtype
        self._points = [INPUT]
        # By a tensor's id: the tensor, the call that made it, and how often it had been written to then.
        self._made: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        # The last call that reads what a call has made.
        self._last_read: list[int] = [0]
        # By call: the call whose output holds the same numbers.
        self._same_as: list[int] = [0]
        self._with_form: set[int] = set()
        # The first call that reads values, on which later calls may depend.
        self._first_value: int | None = None
        self.uses: list[Use] = []
        self.attention: int | None = None
        self.signature: list[tuple[str, tuple]] = []
        self._note_made(hidden, 0)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        point, kwargs = self.next_point(func), kwargs or {}
        self._points.append(point)
        self._last_read.append(point.call)
        self._same_as.append(point.call)
        operands = tensors_in((args, kwargs))
        versions = [x._version for x in operands]
        sources = {call for x in operands if (call := self._call_of(x)) is not None}
        for product in products_of(func, args, kwargs, self._names.is_weight):
            if name := self._names.find(product.weight):
                self.uses.append(Use(name, point.call, self._unchanged(product.X) if product.alone else None))
        if self.attention is None and point.function in _ATTENTION:
            self.attention = point.call
        out = func(*args, **kwargs)
        written = [x for x, version in zip(operands, versions, strict=True) if x._version != version]
        made = [*tensors_in(out), *written]
        self.signature.append((point.function, tuple(tuple(x.shape) for x in made)))
        if sources and self._first_value is None and _reads_values(point.function, args, kwargs):
            self._first_value = point.call
        # A shape or a dtype is the same for a tensor without data.
        if made and sources:
            for call in sources:
                self._last_read[call] = point.call
            if point.function in SAME and len(sources) == 1:
                self._same_as[point.call] = self._same_as[min(sources)]
            for x in made:
                self._note_made(x, point.call)
            if isinstance(out, Tensor) and (out.shape, out.dtype) == self._form:
                self._with_form.add(point.call)
        return out

    def end(self, outputs: Any) -> None:
        """Note what leaves the block, returned or handed on in one of its arguments."""
        for x in tensors_in(outputs):
            if (call := self._call_of(x)) is not None:
                self._last_read[call] = _CALLER

    def is_at(self, tensor: Any, point: Point) -> bool:
        """Whether a tensor holds the numbers of a point, perhaps in another shape."""
        call = self._call_of(tensor) if isinstance(tensor, Tensor) else None
        return call is not None and self._same_as[call] == self._same_as[point.call]

    def cuts(self) -> list[Point]:
        """The first cut between each two layers that are used one after the other, if there is one."""
        calls = [use.call for use in self.uses]
        # By call: the last call that reads something made before it.
        read_until = [0, *accumulate(self._last_read, max)]
        found = []
        for before, after in pairwise(calls):
            between = (call for call in range(before, after) if call in self._with_form and read_until[call] <= call)
            if (cut := next(between, None)) is not None and not self._varies(self._points[cut]):
                found.append(self._points[cut])
        return found

    def enough(self, point: Point, cut: Point) -> bool:
        """Whether the block can go on from a point, if the cut before it is there as well."""
        same = self._same_as[cut.call]
        made_before = (n for n in range(point.call) if n < cut.call or self._same_as[n] != same)
        return all(self._last_read[n] <= point.call for n in made_before)

    def input_of(self, layer: str) -> Point | None:
        """The point of a layer's input; None if it is not known, or not the same in every micro-batch.

        A layer that is used twice has two inputs.
        """
        made, *others = (use.made for use in self.uses if use.layer == layer)
        return None if made is None or others or self._varies(made) else made

    def call_of(self, layer: str) -> int:
        """The number of the first call that multiplies with a layer."""
        return next(use.call for use in self.uses if use.layer == layer)

    def _varies(self, point: Point) -> bool:
        """Whether another micro-batch may number the point's call differently.

        It may reach other experts, or take another branch.
        """
        if self._first_value is not None and self._first_value <= point.call:
            return True
        return any(is_expert(use.layer, self.experts) and use.call <= point.call for use in self.uses)

    def _note_made(self, x: Tensor, call: int) -> None:
        known = self._made.get(id(x))
        # A function may return its argument. That is a new tensor only if it was written to.
        if not (known and known[0]() is x and known[2] == x._version):
            self._made[id(x)] = weakref.ref(x), call, x._version

    def _call_of(self, x: Tensor) -> int | None:
        known = self._made.get(id(x))
        return known[1] if known and known[0]() is x else None

    def _unchanged(self, x: Tensor) -> Point | None:
        known = self._made.get(id(x))
        return self._points[known[1]] if known and known[0]() is x and known[2] == x._version else None


def _reads_values(function: str, args: tuple, kwargs: dict) -> bool:
    """Whether what follows a call, or the shape of its result, depends on values of tensors."""
    if function == "__getitem__":
        return any(x.dtype in (torch.bool, torch.uint8) for x in tensors_in(args[1]))
    return function in _VALUES or (function == "where" and len(args) + len(kwargs) == 1)
