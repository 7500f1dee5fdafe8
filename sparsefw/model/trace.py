"""The trace of a model's forward: what it gives each of its blocks, and the calls that it makes between them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from sparsefw.model.nested import ValueRef, numbers_in, rebuilt
from sparsefw.model.tape import name_of, tensors_in


@dataclass
class Step:
    """A call of a torch function between two blocks.

    Attributes:
        function: the function.
        args, kwargs: its arguments, with references in place of tensors.
        outputs: numbers of the tensors that it returns.
        in_place: whether it writes to its first argument, and returns it.
        last: numbers of the tensors that nothing reads after this step.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: list[int]
    in_place: bool = False
    last: list[int] = field(default_factory=list)

    @property
    def reads(self) -> set[int]:
        """Numbers of the tensors of blocks that it reads."""
        return numbers_in((self.args, self.kwargs))


def replay(steps: list[Step], values: dict[int, Tensor], constant: Callable[[int], Tensor]) -> None:
    """Make the calls of a trace again with other tensors.

    Args:
        steps: the calls.
        values: tensors of blocks by their numbers. Those that the steps return are added, and those that nothing reads
            any more are removed.
        constant: called with the number of a constant; returns it.
    """

    def leaf(x: Any) -> Tensor:
        return values[x.number] if isinstance(x, ValueRef) else constant(x.number)

    for step in steps:
        args, kwargs = rebuilt((step.args, step.kwargs), leaf)
        if step.in_place:
            args = (args[0].clone(), *args[1:])
        values.update(zip(step.outputs, tensors_in(step.function(*args, **kwargs)), strict=True))
        # The loop's names would hold them.
        del args, kwargs
        for number in step.last:
            del values[number]


@dataclass
class Call:
    """A call of a block by the model's forward.

    Attributes:
        args, kwargs: the arguments besides the hidden states, with references in place of tensors.
        steps: the calls between the block before and this one, without those that nothing depends on.
        hidden: the reference of the hidden states; None for the first block. It is a `ConstantRef` where they do not
            come from the blocks before, as in the first block of a decoder after an encoder.
        outputs: numbers of the tensors that the block returns, the hidden states first.
        form: what the block returns, with references.
        unpadded: (batch, seqlen) true at the positions that count; None: all do.
    """

    args: Any
    kwargs: Any
    steps: list[Step] = field(default_factory=list)
    hidden: Any = None
    outputs: list[int] = field(default_factory=list)
    form: Any = None
    unpadded: Tensor | None = None

    @property
    def reads(self) -> set[int]:
        """Numbers of the tensors of blocks among its arguments."""
        return numbers_in((self.hidden, self.args, self.kwargs))


@dataclass
class Trace:
    """The trace of a forward.

    Attributes:
        calls: the calls of blocks, by their number.
        hidden: the input of the first block.
        live: by block, numbers of the tensors that are needed once the next block has begun, besides its hidden states.
        constants: the constants by their number.
        objects: the objects that several blocks are given, as they are before the first block.
        batch_dependent: numbers of the constants that depend on the arguments of the forward.
        end: numbers of the tensors that the forward reads after the last block, besides its hidden states.
        batch_after: whether it reads its own arguments after the last block, too, or what is made of them.
        windows_first: whether hidden states are (windows, tokens, d); a model may have tokens first. Their shape does
            not tell where a micro-batch has as many windows as tokens.
    """

    calls: dict[int, Call]
    hidden: Tensor
    live: dict[int, list[int]]
    constants: dict[int, Tensor] = field(default_factory=dict)
    objects: list[Any] = field(default_factory=list)
    batch_dependent: set[int] = field(default_factory=set)
    end: set[int] = field(default_factory=set)
    batch_after: bool = False
    windows_first: bool = True

    @property
    def by_window(self) -> bool:
        """Whether the forward after the last block can be run with each window by itself."""
        return self.windows_first and not self.end and not any(call.steps for call in self.calls.values())

    @property
    def divisible(self) -> bool:
        """Whether blocks can be run with some windows of a micro-batch: hidden states are all that a window has."""
        return self.windows_first and not (self.batch_dependent or self.objects or any(self.live.values()))

    @cached_property
    def signature(self) -> list[Any]:
        """A comparable form. Traces with equal ones hand the same tensors on in the same way."""
        return [
            (call.reads, call.outputs, [(name_of(step.function), step.outputs) for step in call.steps])
            for call in self.calls.values()
        ]
