"""The trace of a model's forward: the arguments that the forward gives each block, and its calls between blocks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from sparsefw.model.nested import ValueRef, numbers_in, rebuilt
from sparsefw.model.tape import name_of, tensors_in

# Tensors by their numbers in a trace.
Values = dict[int, Tensor]


@dataclass
class Step:
    """A call of a torch function between two blocks.

    Attributes:
        function: the function.
        args, kwargs: its arguments, with references in place of tensors.
        outputs: numbers of the tensors that it returns.
        in_place: whether it writes to its first argument, and returns it.
        last: numbers of the tensors that are freed after this step, since no later step or block reads them.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: list[int]
    in_place: bool
    last: list[int] = field(default_factory=list)

    @property
    def reads(self) -> set[int]:
        """Numbers of the followed tensors (see `ValueRef`) among the arguments."""
        return numbers_in((self.args, self.kwargs))


def replay(steps: list[Step], values: Values, constant: Callable[[int], Tensor]) -> None:
    """Repeat recorded calls with other tensors.

    Args:
        steps: the calls.
        values: the followed tensors by their numbers. The results of the steps are added, and tensors that no later
            step or block reads are removed.
        constant: called with the number of a constant; returns the constant.
    """

    def leaf(x: Any) -> Tensor:
        return values[x.number] if isinstance(x, ValueRef) else constant(x.number)

    for step in steps:
        args, kwargs = rebuilt((step.args, step.kwargs), leaf)
        if step.in_place:
            args = (args[0].clone(), *args[1:])
        values.update(zip(step.outputs, tensors_in(step.function(*args, **kwargs)), strict=True))
        # These variables would keep the arguments in memory.
        del args, kwargs
        for number in step.last:
            del values[number]


@dataclass
class Call:
    """A call of a block by the model's forward.

    Attributes:
        args, kwargs: all arguments but the hidden states, with references in place of tensors.
        steps: the calls between the previous block and this one whose results are used.
        hidden: the reference of the hidden states; None for the first block. A `ConstantRef` means that no earlier
            block computes them, as for the first block of a decoder after an encoder.
        outputs: numbers of the tensors that the block returns, the hidden states first.
        returned: the block's output, with references in place of tensors.
        unpadded: (batch, seqlen) true at tokens, false at padding; None: there is no padding.
    """

    args: Any
    kwargs: Any
    steps: list[Step] = field(default_factory=list)
    hidden: Any = None
    outputs: list[int] = field(default_factory=list)
    returned: Any = None
    unpadded: Tensor | None = None

    @property
    def reads(self) -> set[int]:
        """Numbers of the followed tensors among the arguments, the hidden states included."""
        return numbers_in((self.hidden, self.args, self.kwargs))


@dataclass
class Trace:
    """The trace of a forward. Tensors have numbers: followed tensors (`ValueRef`), and constants (`ConstantRef`).

    Attributes:
        calls: the calls of blocks, by the block's number.
        hidden: the input of the first block.
        live: for each block, numbers of the followed tensors that are read after the next block has begun. The next
            block's hidden states are not listed.
        constants: the constants by number.
        objects: the objects that are arguments of several blocks, in their state before the first block.
        batch_dependent: numbers of the constants that depend on the arguments of the forward.
        end: numbers of the followed tensors that the forward reads after the last block. The last block's hidden states
            are not listed.
        batch_after: whether the forward reads the model's arguments, or tensors that depend on them, after the last
            block.
        windows_first: whether hidden states are (windows, tokens, d). If not, they are (tokens, windows, d). The shape
            does not tell which, when a micro-batch has as many windows as tokens.
    """

    calls: dict[int, Call]
    hidden: Tensor
    live: dict[int, list[int]]
    constants: Values = field(default_factory=dict)
    objects: list[Any] = field(default_factory=list)
    batch_dependent: set[int] = field(default_factory=set)
    end: set[int] = field(default_factory=set)
    batch_after: bool = False
    windows_first: bool = True

    @property
    def by_window(self) -> bool:
        """Whether the forward after the last block can run on one window at a time."""
        return self.windows_first and not self.end and not any(call.steps for call in self.calls.values())

    @property
    def divisible(self) -> bool:
        """Whether blocks can run on a part of a micro-batch: nothing but the hidden states depends on the windows."""
        return self.windows_first and not (self.batch_dependent or self.objects or any(self.live.values()))

    @cached_property
    def signature(self) -> list[Any]:
        """Equal for two traces whose blocks and steps pass tensors to each other in the same way."""
        return [
            (call.reads, call.outputs, [(name_of(step.function), step.outputs) for step in call.steps])
            for call in self.calls.values()
        ]
