"""Hidden states on their way through the blocks of a model, in micro-batches.

The blocks run one by one. `forward.embed` has traced the model's own forward, and each block gets the arguments that
this forward gives it. A block may also pass other tensors than hidden states to later blocks (`handed_on`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.arithmetic import AsyncBool, all_finite, check_finite
from sparsefw.errors import InputError
from sparsefw.model.activations import Activations, Stored
from sparsefw.model.block_model import BlockModel
from sparsefw.model.nested import ConstantRef, ObjectRef, ValueRef, leaves_of, outline, rebuilt, tensors_of
from sparsefw.model.partial_forward import INPUT, UNSUPPORTED, Point, run_part
from sparsefw.model.stubs import hidden_of
from sparsefw.model.trace import Call, Values, replay


@dataclass(frozen=True)
class MicroBatch:
    """All that a micro-batch holds between two blocks, without its hidden states.

    Attributes:
        windows: number of windows in the micro-batch.
        name: name of the caller's batch, for messages; "" for windows.
        calls: the traced calls of blocks, by the block's number.
        constants: the constants of the trace by number. Forks share them.
        objects: the objects that are an argument of several blocks.
        values: tensors that later blocks read, by their numbers in the trace. They are in a store (`Stored`), or are
            tensors while a block runs.
    """

    windows: int = 1
    name: str = ""
    calls: dict[int, Call] = field(default_factory=dict)
    constants: dict[int, Stored] = field(default_factory=dict)
    objects: list[Any] = field(default_factory=list)
    values: dict[int, Any] = field(default_factory=dict)


class BlockRun:
    """A callable that runs a block on one micro-batch: takes the hidden states, and returns the block's output.

    The block may change objects among its arguments, so every run gets a copy of them. Only the block calls torch
    functions in a run, so that `run_part` can number its calls.

    Args:
        model: the model.
        i: number of the block.
        block: a module that runs in place of the block; None: the block itself runs.
        batch: the micro-batch before the block.
        read: called with each stored tensor among the arguments, and returns what the block gets.

    Attributes:
        returned: what the block returned in the last run.
    """

    def __init__(
        self,
        model: BlockModel,
        i: int,
        block: nn.Module | None,
        batch: MicroBatch,
        read: Callable[[Stored, Tensor], Tensor] = lambda stored, x: x,
    ) -> None:
        self._read = read
        self._model, self._number, self._block, self._batch = model, i, block or model.blocks[i], batch
        self._tensors: dict[Stored, Tensor] = {}
        self._values = {n: self._tensor(x) for n, x in batch.values.items()}
        self._objects = objects = rebuilt(batch.objects, self._tensor)
        call = batch.calls[i]
        args, kwargs = rebuilt(
            (call.args, call.kwargs), lambda x: objects[x.number] if isinstance(x, ObjectRef) else self._tensor(x)
        )
        self._given = objects, args, kwargs
        self.returned: Any = None

    def _tensor(self, leaf: Any) -> Any:
        """The tensor that a leaf (a reference or a stored tensor) of a nested value stands for."""
        if isinstance(leaf, ValueRef):
            return self._values[leaf.number]
        if isinstance(leaf, ConstantRef):
            leaf = self._batch.constants[leaf.number]
        if not isinstance(leaf, Stored):
            return leaf
        if leaf not in self._tensors:
            self._tensors[leaf] = self._read(leaf, leaf.read())
        return self._tensors[leaf]

    def __call__(self, hidden: Tensor) -> Any:
        self.returned = None
        self._objects, args, kwargs = rebuilt(self._given, lambda leaf: leaf)
        with self._model.explained(self._model.names[self._number]):
            self.returned = self._block(hidden, *args, **kwargs)
        return self.returned

    def handed_on(self) -> MicroBatch:
        """The micro-batch after the last run, with all tensors that later blocks may read."""
        outputs = dict(zip(self._batch.calls[self._number].outputs, leaves_of(self.returned), strict=False))
        return replace(self._batch, objects=self._objects, values=self._values | outputs)

    def next_input(self) -> tuple[MicroBatch, Tensor]:
        """The micro-batch before the next block, and that block's input; after the last block, the block's output."""
        batch = self.handed_on()
        following = batch.calls.get(self._number + 1)
        if following is None:
            return batch, hidden_of(self.returned)
        replay(following.steps, batch.values, lambda number: self._tensor(ConstantRef(number)))
        hidden = following.hidden
        return batch, batch.values[hidden.number] if isinstance(hidden, ValueRef) else self._tensor(hidden)

    def stored(self, batch: MicroBatch, live: Iterable[int], put: Callable[[Tensor], Stored]) -> MicroBatch:
        """Store the live values of a micro-batch by `put`. Tensors that were read from a store stay there."""
        where = {id(x): known for known, x in self._tensors.items()}

        def leaf(x: Tensor) -> Stored:
            if id(x) not in where:
                where[id(x)] = put(x)
            return where[id(x)]

        objects, values = rebuilt((batch.objects, {n: batch.values[n] for n in live}), leaf)
        return replace(batch, objects=objects, values=values)


@dataclass
class HiddenStates:
    """Micro-batches of windows between two blocks of a model.

    Attributes:
        model: the model whose blocks run.
        hidden: the hidden states of each micro-batch at `position`, (batch, seqlen, d) in most models.
        batches: the other data of each micro-batch.
        pieces: the other data of a piece of a micro-batch, by the piece's number of windows, see `some`.
        position: the point of the current block that `hidden` has reached; at first the block's input.
        kept: a later point at which runs begin, and the tensors there; None: runs begin at `position`.
        prefetched: number of the micro-batch that is copied to the device ahead of use, and its stored tensors.
        unchecked: the pending NaN check: block, micro-batch, and whether the hidden states are finite. The result is
            read one micro-batch later, so that the host does not wait for the GPU.
    """

    model: BlockModel
    hidden: Activations
    batches: list[MicroBatch] = field(default_factory=list)
    pieces: dict[int, MicroBatch] = field(default_factory=dict)
    position: Point = INPUT
    kept: tuple[Point, Activations] | None = None
    prefetched: tuple[int, list[Stored]] = (0, [])
    unchecked: tuple[int, int, AsyncBool] | None = None

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.hidden)

    @property
    def windows(self) -> list[int]:
        """Number of windows in each micro-batch."""
        return [batch.windows for batch in self.batches]

    def fork(self) -> "HiddenStates":
        """Return a copy that moves through the blocks independently. Both share the tensors."""
        hidden, batches = self.hidden.fork(), [*self.batches]
        return replace(self, hidden=hidden, batches=batches, position=INPUT, kept=None, unchecked=None)

    def some(self, numbers: Sequence[int]) -> "HiddenStates":
        """Take some of the micro-batches, at the input of a block.

        They are cut into pieces, if `pieces` has any. A piece is a view of the hidden states, without a copy. All
        pieces of one size share the other data.
        """
        size = max(self.pieces, default=0)
        batches = [self.batches[j] for j in numbers]
        if size:
            batches = [self.pieces[min(size, x.windows - n)] for x in batches for n in range(0, x.windows, size)]
        return replace(self, hidden=self.hidden.some(numbers, size), batches=batches, kept=None, unchecked=None)

    def go_back(self, start: "HiddenStates") -> None:
        """Return to an earlier state: take over the micro-batches of `start`, a fork at the input of a block."""
        self.hidden, self.batches, self.position, self.kept = start.hidden, start.batches, INPUT, None

    def close(self) -> None:
        """Release all tensors."""
        self.hidden.clear()
        self.batches, self.kept = [], None

    def run_of(self, i: int, j: int, block: nn.Module | None = None) -> BlockRun:
        """Prepare a run of block i on micro-batch j; `block`, if given, runs in place of block i."""
        if self.hidden.store.pins:
            number, fetched = self.prefetched
            if number not in (j, j + 1):
                # The prefetched micro-batch was skipped.
                for stored in fetched:
                    stored.drop()
            self.prefetched = j + 1, self._given(i, j + 1) if j + 1 < len(self) else []
            for stored in self.prefetched[1]:
                stored.fetch()
        return BlockRun(self.model, i, block, self.batches[j])

    def _given(self, i: int, j: int) -> list[Stored]:
        """The stored tensors among the arguments of block i for micro-batch j, without the hidden states."""
        batch, call = self.batches[j], self.batches[j].calls[i]
        leaves = leaves_of([batch.values, batch.objects, call.args, call.kwargs])
        found = (batch.constants[x.number] if isinstance(x, ConstantRef) else x for x in leaves)
        return [x for x in found if isinstance(x, Stored)]

    def unpadded(self, i: int, j: int) -> Tensor | None:
        """(batch, seqlen) for micro-batch j in block i: true at tokens, false at padding; None: there is no padding."""
        return self.batches[j].calls[i].unpadded

    def after_last(self, j: int) -> Values:
        """The tensors of blocks that the forward reads after the last block for micro-batch j, by number.

        The last block's hidden states are not among them.
        """
        return {number: self.batches[j].values[number].read() for number in self.model.flow.end}

    def between(self) -> list[Tensor]:
        """The tensors of the first micro-batch: its hidden states, what blocks have handed on, and constants.

        Only constants that depend on the arguments of the forward are listed. They differ between micro-batches.
        """
        first = self.batches[0]
        constants = first.constants
        stored = dict.fromkeys(leaves_of([first.values, first.objects]))
        handed_on = [x.read() for x in stored if isinstance(x, Stored) and x not in constants.values()]
        dependent = sorted(self.model.flow.batch_dependent & constants.keys())
        return [self.hidden[0], *handed_on, *(constants[n].read() for n in dependent)]

    def handed_on(self, i: int, run: BlockRun) -> list[Tensor]:
        """The tensors that later blocks read after a run of block i, without the hidden states."""
        batch = run.handed_on()
        live = [batch.values[n] for n in self.model.flow.live.get(i, []) if n in batch.values]
        return tensors_of([live, batch.objects])

    def part(
        self, i: int, j: int, block: nn.Module | None = None, *, take: Iterable[Point] = (), end: Point | None = None
    ) -> tuple[dict[Point, Tensor], BlockRun | None]:
        """Run micro-batch j through a part of block i, from `position` or `kept` on.

        Args:
            i, j: number of the block and of the micro-batch.
            block: a module that runs in place of block i; None: block i runs.
            take, end: as in `run_part`.

        Returns:
            The wanted tensors, and the run. The run is None if it ended before the end of the block.

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
            if name := self.batches[j].name:
                raise InputError(f"{name}: {error}") from error
            raise
        return taken, None if returned is None else run

    def output(self, i: int, j: int, block: nn.Module | None = None) -> BlockRun:
        """Run micro-batch j to the end of block i; `block`, if given, runs in place of block i."""
        _, run = self.part(i, j, block)
        assert run is not None
        return run

    def advance(self, i: int, block: nn.Module | None = None) -> None:
        """Run all micro-batches through block i to the next block's input; `block`, if given, runs in its place.

        Raises:
            InputError: an output holds NaN or Inf.
        """
        for j in range(len(self)):
            self.leave(i, j, self.output(i, j, block))
        self.arrive(INPUT)

    def leave(self, i: int, j: int, run: BlockRun) -> None:
        """Move micro-batch j to the input of block i + 1, with all tensors that later blocks read.

        Raises:
            InputError: the block's output has another structure than that of other blocks of its class; or as `put`.
        """
        if _structure_of(run.returned) != _structure_of(self.batches[j].calls[i].returned):
            raise InputError(
                f"{self.model.names[i]}: {UNSUPPORTED}: the block does not return the same as other blocks of its class"
            )
        with torch.no_grad():
            batch, hidden = run.next_input()
        self.batches[j] = run.stored(batch, self.model.flow.live[i], self.hidden.store.put)
        self.put(i, j, hidden)

    def is_chained(self, i: int) -> bool:
        """Whether block i + 1 reads the output of block i. If not, a new chain begins, such as a decoder's."""
        call, following = self.batches[0].calls[i], self.batches[0].calls.get(i + 1)
        if following is None:
            return True
        reached = {*call.outputs}
        for step in following.steps:
            if step.reads & reached:
                reached.update(step.outputs)
        return isinstance(following.hidden, ValueRef) and following.hidden.number in reached

    def next_input(self, i: int, j: int) -> Tensor:
        """Run micro-batch j through block i, and return the next block's input with its autograd graph."""
        run = self.run_of(i, j)
        run(self.hidden[j])
        return run.next_input()[1]

    def arrive(self, position: Point, kept: tuple[Point, Activations] | None = None) -> None:
        """Set `position` and `kept` after all micro-batches have moved. `INPUT` is the input of the next block."""
        self.position, self.kept = position, kept
        self.settle()

    def put(self, i: int, j: int, out: Tensor) -> None:
        """Set the hidden states of micro-batch j: `out` at a later point of block i, or after the block.

        The check of `out` for NaN is read when the next micro-batch is put, or by `settle`. A GPU would idle if the
        host read it now. Only one check is pending at a time, so that few micro-batches are in memory.

        Raises:
            InputError: the micro-batch that was put before holds NaN or Inf.
        """
        self.hidden[j] = out
        finite = AsyncBool(all_finite(out))
        self.settle()
        self.unchecked = (i, j, finite)

    def settle(self) -> None:
        """Check the micro-batch that was put last.

        Raises:
            InputError: this micro-batch holds NaN or Inf.
        """
        if self.unchecked:
            (i, j, finite), self.unchecked = self.unchecked, None
            if not finite:
                check_finite(f"activations after {self.model.names[i]}", self.hidden[j])


def _structure_of(returned: Any) -> list[Any]:
    return outline(returned, lambda leaf: "tensor")
