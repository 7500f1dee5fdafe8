"""How a block's forward goes from its input to its output: which call makes a tensor, and which calls read it.

A tensor is enough to go on from, if no later call reads anything that was made before it. A cut is such a tensor that
has the form of the hidden states: the sum behind the attention is one in most models. It can take the block's input's
place, and later layers need no more of the block than what lies behind it.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from sparsefw.model.layers.block_tape import BlockTape
from sparsefw.model.layers.names import is_expert
from sparsefw.model.parts import INPUT, SAME, Point, next_point
from sparsefw.model.tape import Op, Value

# Stands for the block's caller, who reads its output after all calls.
_CALLER = 1 << 60

# Functions that read values of a tensor, by name. What a block does behind them may depend on what they read.
_VALUES = {"__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "item", "tolist", "numpy"}
_VALUES |= {"equal", "allclose", "is_nonzero", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"}


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


class Dataflow:
    """What follows from the block's input in a recorded forward. A call is an operation; 0 is the block's input.

    Args:
        tape: the forward.
        experts: names of modules that may be experts.

    Attributes:
        cuts: the first cut between each two layers that are used one after the other, where there is one.
        uses: the calls that multiply with a layer, selected or not.
        signature: function and form of the output of every call. Equal signatures mean equal forwards.
    """

    def __init__(self, tape: BlockTape, experts: frozenset[str]) -> None:
        self._experts, self._ops = experts, tape.ops
        self._points = [*accumulate(tape.ops, lambda point, op: next_point(point, op.function), initial=INPUT)]
        self._follows = {0}
        # By call: the last call that reads what it makes; and the call whose output holds the same numbers.
        self._last_read = [0, *(op.number for op in tape.ops)]
        self._same_as = [0, *(op.number for op in tape.ops)]
        # Calls that return something of the form of hidden states.
        self._like_hidden: set[int] = set()
        # The first call that reads values, on which later calls may depend.
        self._first_value: int | None = None
        self.signature = [(op.name, tuple(tuple(x.shape) for x in op.made)) for op in tape.ops]
        self.uses: list[Use] = []
        form = tape.hidden.shape, tape.hidden.dtype
        for op in tape.ops:
            sources = {call for x in op.inputs if (call := self.call_of_value(x)) is not None}
            for product in tape.products.get(op.number, ()):
                made = self._unchanged(product.X) if product.alone and isinstance(product.X, Value) else None
                self.uses.append(Use(product.layer, op.number, made))
            if sources and self._first_value is None and _reads_values(op):
                self._first_value = op.number
            # A shape or a dtype is the same for a tensor without data.
            if not op.made or not sources:
                continue
            self._follows.add(op.number)
            for call in sources:
                self._last_read[call] = op.number
            if op.name in SAME and len(sources) == 1:
                self._same_as[op.number] = self._same_as[min(sources)]
            if isinstance(op.out, Value) and (op.out.shape, op.out.dtype) == form:
                self._like_hidden.add(op.number)
        for x in (tape.output, *tape.handed_on):
            if (call := self.call_of_value(x)) is not None:
                self._last_read[call] = _CALLER
        self.cuts = self._find_cuts()

    def call_of_value(self, x: Value) -> int | None:
        """The call that has made a value; None if it does not follow from the block's input."""
        return x.maker if x.maker in self._follows else None

    def is_at(self, x: object, point: Point) -> bool:
        """Whether a value holds the numbers of a point, perhaps in another shape."""
        call = self.call_of_value(x) if isinstance(x, Value) else None
        return call is not None and self._same_as[call] == self._same_as[point.call]

    def _find_cuts(self) -> list[Point]:
        """The first cut between each two layers that are used one after the other, if there is one."""
        calls = [use.call for use in self.uses]
        # By call: the last call that reads something made before it.
        read_until = [0, *accumulate(self._last_read, max)]
        found = []
        for before, after in pairwise(calls):
            between = (call for call in range(before, after) if call in self._like_hidden and read_until[call] <= call)
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
        return any(is_expert(use.layer, self._experts) and use.call <= point.call for use in self.uses)

    def _unchanged(self, x: Value) -> Point | None:
        """The point of a value; None if it was written to by other means than the call itself."""
        if (call := self.call_of_value(x)) is None:
            return None
        return self._points[call] if not call or x in self._ops[call - 1].made else None


def _reads_values(op: Op) -> bool:
    """Whether what follows a call, or the shape of its result, depends on values of tensors."""
    if op.name == "__getitem__":
        return any(x.dtype in (torch.bool, torch.uint8) for x in op.inputs[1:])
    return op.name in _VALUES or (op.name == "where" and len(op.args) + len(op.kwargs) == 1)
