"""How a model's blocks hand tensors on, as a recorded forward shows it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparsefw.model.tape import name_of, tensors_in
from sparsefw.model.values import numbers_in, rebuilt


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
    """

    args: Any
    kwargs: Any
    steps: list[Step] = field(default_factory=list)
    hidden: Any = None
    outputs: list[int] = field(default_factory=list)
    form: Any = None
    after: int = 0


@dataclass(frozen=True)
class Flow:
    """How a model's blocks hand tensors on.

    Attributes:
        live: by block, numbers of the tensors that are needed after the next one has begun, beside hidden states.
        end: numbers of the tensors that are read behind the last block, beside its hidden states.
        has_steps: whether calls are made between blocks.
        signature: see `Recording`.
        batch_behind: see `Recording`.
        windows_first: whether hidden states are (windows, tokens, d); a model may have tokens first. Their shape does
            not tell where a micro-batch has as many windows as tokens.
    """

    live: dict[int, list[int]]
    end: set[int]
    has_steps: bool
    signature: list[Any]
    batch_behind: bool = False
    windows_first: bool = True

    @property
    def by_window(self) -> bool:
        """Whether what lies behind the last block can be run with each window by itself."""
        return self.windows_first and not self.has_steps and not self.end


@dataclass
class Recording:
    """One forward.

    Attributes:
        hidden: the input of the first block.
        calls: what each block is given, by its number, in the order of the calls.
        boxes: the objects that several blocks are given, as they are before the first block.
        constants: the tensors for which `Constant`s stand.
        of_batch: numbers of the constants that depend on what the forward is given.
        end: numbers of the tensors that are read behind the last block, but for its hidden states.
        batch_behind: whether what the forward is given is read behind the last block, too, or what is made of it.
    """

    hidden: Tensor
    calls: dict[int, Call]
    boxes: list[Any]
    constants: list[Tensor]
    of_batch: set[int]
    end: set[int]
    batch_behind: bool = False

    @property
    def signature(self) -> list[Any]:
        """Equal signatures mean that the same tensors are handed on in the same way."""
        return [
            (
                i,
                sorted(numbers_in(call.hidden)),
                call.outputs,
                [(name_of(x.function), x.outputs) for x in call.steps],
                sorted(numbers_in((call.args, call.kwargs))),
            )
            for i, call in self.calls.items()
        ]

    @property
    def flow(self) -> Flow:
        """How tensors are handed on, if the whole forward was recorded."""
        has_steps = any(call.steps for call in self.calls.values())
        return Flow(self.live(), self.end, has_steps, self.signature, self.batch_behind)

    def live(self) -> dict[int, list[int]]:
        """By block, numbers of the tensors that are needed after the next block has begun, its hidden states aside."""
        order = list(self.calls)
        # The run of the n-th block is at the time 2n, what lies between it and the next one at 2n + 1.
        made: dict[int, int] = {}
        used = dict.fromkeys(self.end, 2 * len(order))
        for n, call in enumerate(self.calls.values()):
            for step in call.steps:
                # A step may return what it is given.
                made |= {number: made.get(number, 2 * n - 1) for number in step.outputs}
                used |= {number: max(used.get(number, 0), 2 * n - 1) for number in numbers_in((step.args, step.kwargs))}
            used |= {number: max(used.get(number, 0), 2 * n - 1) for number in numbers_in(call.hidden)}
            used |= {number: max(used.get(number, 0), 2 * n) for number in numbers_in((call.args, call.kwargs))}
            made |= dict.fromkeys(call.outputs, 2 * n + 1)
        times = {i: 2 * n + 1 for n, i in enumerate(order)}
        return {i: sorted(v for v in used if made[v] <= time < used[v]) for i, time in times.items()}
