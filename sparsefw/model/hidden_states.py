"""Hidden states on their way through the blocks of a model, in micro-batches.

The blocks run one by one, each with what the model's own forward gives it, as `forward.embed` has recorded it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.arithmetic import AsyncBool, all_finite, check_finite
from sparsefw.errors import InputError
from sparsefw.model.activations import Activations, Store, Stored
from sparsefw.model.block_model import BlockModel
from sparsefw.model.parts import INPUT, UNSUPPORTED, Point, run_part
from sparsefw.model.recording import Box, Call, Constant, Recording, Value, leaves_of, outline, rebuilt, tensors_of
from sparsefw.model.stand_ins import explained, hidden_of


@dataclass(frozen=True)
class Carried:
    """What one micro-batch has between two blocks beside its hidden states, as keys and values that blocks share.

    Attributes:
        constants: the tensors that the model's forward makes before its first block. All streams share them.
        boxes: the objects that several blocks are given.
        values: tensors by their numbers in the recording, or where they are stored.
    """

    constants: list[Stored]
    boxes: list[Any]
    values: dict[int, Any] = field(default_factory=dict)


class BlockRun:
    """Runs a block on one micro-batch: called with its hidden states, it returns what the block does.

    Every run begins with the objects as they were before the block. No torch function is called but by the block.

    Args:
        model: the model.
        i: number of the block.
        block: another module in its place; None: the block itself.
        call: what the model's forward gives the block.
        carried: what the micro-batch has from before the block.

    Attributes:
        returned: what the block returned in the last run.
    """

    def __init__(self, model: BlockModel, i: int, block: nn.Module | None, call: Call, carried: Carried) -> None:
        self._model, self._number, self._block, self._call = model, i, block or model.blocks[i], call
        self._constants, self._tensors = carried.constants, dict[Stored, Tensor]()
        self._values = {n: self._tensor(x) for n, x in carried.values.items()}
        self._boxes = boxes = rebuilt(carried.boxes, self._tensor)
        args, kwargs = rebuilt(
            (call.args, call.kwargs), lambda x: boxes[x.number] if isinstance(x, Box) else self._tensor(x)
        )
        self._given = boxes, args, kwargs
        self.returned: Any = None

    def _tensor(self, leaf: Any) -> Any:
        """The tensor that something stands for."""
        if isinstance(leaf, Value):
            return self._values[leaf.number]
        if isinstance(leaf, Constant):
            leaf = self._constants[leaf.number]
        if not isinstance(leaf, Stored):
            return leaf
        if leaf not in self._tensors:
            self._tensors[leaf] = leaf.read()
        return self._tensors[leaf]

    def __call__(self, hidden: Tensor) -> Any:
        self.returned = None
        self._boxes, args, kwargs = rebuilt(self._given, lambda leaf: leaf)
        with explained(type(self._model.model).__name__, self._model.names[self._number], self._model.input_kind):
            self.returned = self._block(hidden, *args, **kwargs)
        return self.returned

    def handed_on(self) -> Carried:
        """All that later blocks may be given after the last run."""
        outputs = dict(zip(self._call.outputs, leaves_of(self.returned), strict=False))
        return Carried(self._constants, self._boxes, self._values | outputs)

    def input_of(self, following: Call | None) -> tuple[Carried, Tensor]:
        """All tensors when the next block begins, and its input; None: it was the last block."""
        made = self.handed_on()
        if following is None:
            return made, hidden_of(self.returned)

        def leaf(x: Any) -> Any:
            return made.values[x.number] if isinstance(x, Value) else self._tensor(x)

        for step in following.steps:
            made.values.update(step.run(leaf))
        return made, leaf(following.hidden)

    def stored(self, made: Carried, store: Store) -> Carried:
        """The same with all tensors in a store; those that the micro-batch had before are there already."""
        where = {id(x): known for known, x in self._tensors.items()}

        def leaf(x: Tensor) -> Stored:
            if id(x) not in where:
                where[id(x)] = store.put(x)
            return where[id(x)]

        return Carried(made.constants, *rebuilt((made.boxes, made.values), leaf))


@dataclass
class HiddenStates:
    """Micro-batches of windows between two blocks of a model.

    Attributes:
        model: whose blocks run.
        store: where all tensors of the micro-batches are.
        hidden: per micro-batch, the input of the next block, (batch, seqlen, d) in most models; or the stream at a
            later point of it.
        calls: per micro-batch and block, what the model's forward gives the block.
        carried: per micro-batch, what it has beside its hidden states.
        flow: how blocks hand tensors on.
        windows: number of windows in each micro-batch.
        names: names of batches for messages.
        of_batch: numbers of the constants that depend on what the forward is given.
        pieces: by number of windows, what the forward gives the blocks for a piece of a micro-batch, see `some`.
        position: the point of the block at which `hidden` is.
        kept: a later point of the block that runs begin at, and its tensors; None: they begin at `position`.
        ahead: number of the micro-batch whose tensors are copied to the device ahead, and these.
        unchecked: pending NaN check: block, micro-batch, and whether it is finite, which is read one step late so that
            the host does not wait for the GPU.
    """

    model: BlockModel
    store: Store
    hidden: Activations
    calls: list[dict[int, Call]]
    carried: list[Carried]
    flow: Recording
    windows: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    of_batch: set[int] = field(default_factory=set)
    pieces: dict[int, tuple[dict[int, Call], Carried]] = field(default_factory=dict)
    position: Point = INPUT
    kept: tuple[Point, Activations] | None = None
    ahead: tuple[int, list[Stored]] = (0, [])
    unchecked: tuple[int, int, AsyncBool] | None = None

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.hidden)

    def fork(self) -> "HiddenStates":
        """A copy that runs independently."""
        return replace(
            self, hidden=self.hidden.fork(), carried=[*self.carried], position=INPUT, kept=None, unchecked=None
        )

    def some(self, numbers: Sequence[int], divided: bool = False) -> "HiddenStates":
        """Some of the micro-batches, at the input of a block; with `divided` in pieces, if there are any.

        Pieces are views: nothing is copied. What the forward gives the blocks is the same for all pieces of a size.
        """
        size = max(self.pieces, default=0) if divided else 0
        windows = [self.windows[j] for j in numbers]
        hidden, given = self.hidden.some(numbers, size), [(self.calls[j], self.carried[j]) for j in numbers]
        if size:
            windows = [min(size, n - first) for n in windows for first in range(0, n, size)]
            given = [self.pieces[n] for n in windows]
        calls, carried = [calls for calls, _ in given], [carried for _, carried in given]
        names = [] if size else [name for j in numbers for name in self.names[j : j + 1]]
        moved = replace(self, hidden=hidden, calls=calls, carried=carried, windows=windows, names=names)
        return replace(moved, kept=None, unchecked=None)

    def go_back(self, start: "HiddenStates") -> None:
        """Become what a fork of these micro-batches is, at the input of a block."""
        self.hidden, self.carried, self.position, self.kept = start.hidden, start.carried, INPUT, None

    def close(self) -> None:
        """Let all tensors go."""
        self.hidden.clear()
        self.carried, self.kept = [], None

    def run_of(self, i: int, j: int, block: nn.Module | None = None) -> BlockRun:
        """Runs block i, or another module in its place, with what micro-batch j gives it beside the hidden states."""
        if self.store.pins:
            number, fetched = self.ahead
            if number not in (j, j + 1):
                # It was skipped.
                for stored in fetched:
                    stored.drop()
            self.ahead = j + 1, self._given(i, j + 1) if j + 1 < len(self) else []
            for stored in self.ahead[1]:
                stored.fetch()
        return BlockRun(self.model, i, block, self.calls[j][i], self.carried[j])

    def _given(self, i: int, j: int) -> list[Stored]:
        """What the forward gives block i beside the hidden states of micro-batch j."""
        carried, call = self.carried[j], self.calls[j][i]
        leaves = leaves_of([carried.values, carried.boxes, call.args, call.kwargs])
        found = (carried.constants[x.number] if isinstance(x, Constant) else x for x in leaves)
        return [x for x in found if isinstance(x, Stored)]

    def unpadded(self, i: int, j: int) -> Tensor | None:
        """The positions of micro-batch j in block i that count; None: all."""
        return self.calls[j][i].unpadded

    def behind_last(self, j: int) -> dict[int, Tensor]:
        """The tensors of micro-batch j that are read behind the last block, beside its hidden states."""
        return {number: self.carried[j].values[number].read() for number in self.flow.end}

    def between(self) -> list[Tensor]:
        """The tensors of the first micro-batch: its hidden states, what blocks have handed on, and constants.

        Of the constants only those that depend on what the forward is given: they differ from window to window.
        """
        first = self.carried[0]
        stored = dict.fromkeys(leaves_of([first.values, first.boxes]))
        handed_on = [x.read() for x in stored if isinstance(x, Stored) and x not in first.constants]
        return [self.hidden[0], *handed_on, *(first.constants[n].read() for n in sorted(self.of_batch))]

    def handed_on(self, i: int, run: BlockRun) -> list[Tensor]:
        """The tensors of a run of block i that later blocks are given, beside the hidden states."""
        held = run.handed_on()
        return tensors_of([[held.values[n] for n in self.flow.live.get(i, []) if n in held.values], held.boxes])

    def part(
        self, i: int, j: int, block: nn.Module | None = None, *, take: Iterable[Point] = (), end: Point | None = None
    ) -> tuple[dict[Point, Tensor], BlockRun | None]:
        """Run micro-batch j from where it is through a part of block i, or of another module in its place.

        Args:
            i, j: number of the block and of the micro-batch.
            block: the other module.
            take, end: as in `run_part`.

        Returns:
            The wanted tensors, and the run; None if it ended before the end of the block.

        Raises:
            InputError: as `run_part`.
        """
        given = {self.position: self.hidden[j]}
        if self.kept:
            given[self.kept[0]] = self.kept[1][j]
        run = self.run_of(i, j, block)
        try:
            taken, returned = run_part(run, given, take, end)
        except InputError as error:
            if not any(self.names[j : j + 1]):
                raise
            raise InputError(f"{self.names[j]}: {error}") from error
        return taken, None if returned is None else run

    def output(self, i: int, j: int, block: nn.Module | None = None) -> BlockRun:
        """A run of micro-batch j through block i, or another module in its place."""
        _, run = self.part(i, j, block)
        assert run is not None
        return run

    def advance(self, i: int, block: nn.Module | None = None) -> None:
        """Run all micro-batches through block i, or another module in its place; they are then the next block's input.

        Raises:
            InputError: an output holds NaN or Inf.
        """
        for j in range(len(self)):
            self.leave(i, j, self.output(i, j, block))
        self.arrive(INPUT)

    def leave(self, i: int, j: int, run: BlockRun) -> None:
        """Move micro-batch j on to the input of the block behind block i, with all that later blocks are given.

        Raises:
            InputError: the block returned something else than others of its class; or as `put`.
        """
        if _form_of(run.returned) != _form_of(self.calls[j][i].form):
            raise InputError(
                f"{self.model.names[i]}: {UNSUPPORTED}: it does not return the same as other blocks of its class"
            )
        with torch.no_grad():
            made, hidden = run.input_of(self.calls[j].get(i + 1))
        made = replace(made, values={number: made.values[number] for number in self.flow.live[i]})
        self.carried[j] = run.stored(made, self.store)
        self.put(i, j, hidden)

    def goes_on(self, i: int) -> bool:
        """Whether the input of the block behind block i is made of what block i returns; else something else begins."""
        call, following = self.calls[0][i], self.calls[0].get(i + 1)
        if following is None:
            return True
        reached = {Value(number) for number in call.outputs}
        for step in following.steps:
            if reached.intersection(leaves_of((step.args, step.kwargs))):
                reached |= {Value(number) for number in step.outputs}
        return following.hidden in reached

    def next_input(self, i: int, j: int) -> Tensor:
        """The input that block i makes of micro-batch j for the next block, with its graph of gradients."""
        run = self.run_of(i, j)
        run(self.hidden[j])
        return run.input_of(self.calls[j].get(i + 1))[1]

    def arrive(self, position: Point, kept: tuple[Point, Activations] | None = None) -> None:
        """Note where all micro-batches are now, `INPUT` for the next block's input, and what is kept of them."""
        self.position, self.kept = position, kept
        self.settle()

    def put(self, i: int, j: int, out: Tensor) -> None:
        """Replace micro-batch j by what it is at a later point of block i, or behind it.

        It is checked after the next one has been launched, or by `settle`: a GPU would wait otherwise while the
        host prepares the next one. Only one check is pending at a time, so that no more micro-batches stay in memory.

        Raises:
            InputError: the micro-batch before holds NaN or Inf.
        """
        self.hidden[j] = out
        finite = AsyncBool(all_finite(out))
        self.settle()
        self.unchecked = (i, j, finite)

    def settle(self) -> None:
        """Check the micro-batch that was put last.

        Raises:
            InputError: it holds NaN or Inf.
        """
        if self.unchecked:
            (i, j, finite), self.unchecked = self.unchecked, None
            if not finite:
                check_finite(f"activations after {self.model.names[i]}", self.hidden[j])


def _form_of(returned: Any) -> list[Any]:
    return outline(rebuilt(returned, lambda _: "tensor"))
