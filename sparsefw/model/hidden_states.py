"""Hidden states on their way through the blocks of a model, in micro-batches.

The blocks run one by one, each with what the model's own forward gives it, as `forward.embed` has recorded it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.finite import OnItsWay, all_finite, check_finite
from sparsefw.model.activations import Activations, Store, Stored
from sparsefw.model.block_model import BlockModel
from sparsefw.model.explained import explained
from sparsefw.model.parts import CANNOT_GO_ON, INPUT, UNSUPPORTED, Point, run_part
from sparsefw.model.recording import Call, Flow, Step
from sparsefw.model.stand_ins import hidden_of
from sparsefw.model.values import Box, Constant, Value, leaves_of, outline, rebuilt, tensors_of


@dataclass(frozen=True)
class HandedOn:
    """What one micro-batch has between two blocks beside its hidden states, as keys and values that blocks share.

    Attributes:
        values: tensors by their numbers in the recording, or where they are stored.
        boxes: the objects that several blocks are given.
    """

    values: dict[int, Any] = field(default_factory=dict)
    boxes: list[Any] = field(default_factory=list)


class BlockInputs:
    """The arguments of a block for one micro-batch. Every run begins with the objects as they were before the block.

    Args:
        call: what the model's forward gives the block.
        constants: the micro-batch's tensors from before the first block.
        carried: what it has from the blocks before.
    """

    def __init__(self, call: Call, constants: list[Stored], carried: HandedOn) -> None:
        self._call, self._constants = call, constants
        self._tensors: dict[Stored, Tensor] = {}
        self._values = {n: self.tensor(x) for n, x in carried.values.items()}
        self._given = rebuilt((carried.boxes, call.args, call.kwargs), self.tensor)
        self._boxes: list[Any] = []

    def tensor(self, leaf: Any) -> Any:
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

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """Run the block, or another module in its place. No torch function is called but by the block."""
        boxes, args, kwargs = rebuilt(self._given, lambda leaf: leaf)
        args, kwargs = rebuilt((args, kwargs), lambda leaf: boxes[leaf.number] if isinstance(leaf, Box) else leaf)
        self._boxes = boxes
        return block(hidden, *args, **kwargs)

    def versions(self) -> list[int]:
        """How often each of the given tensors has been written to."""
        return [x._version for x in tensors_of(self._given)]

    def handed_on(self, returned: Any, live: list[int]) -> HandedOn:
        """What later blocks are given after the last run.

        Args:
            returned: what the block has returned.
            live: numbers of the tensors that are needed.
        """
        outputs = dict(zip(self._call.outputs, leaves_of(returned), strict=False))
        values = self._values | outputs
        return HandedOn({number: values[number] for number in live if number in values}, self._boxes)

    def made_by(self, steps: list[Step], values: dict[int, Tensor]) -> dict[int, Tensor]:
        """The tensors by their numbers, with those that steps between this block and the next make of them."""
        values = dict(values)

        def leaf(x: Any) -> Tensor:
            return values[x.number] if isinstance(x, Value) else self.tensor(x)

        for step in steps:
            values |= step.run(leaf)
        return values

    def stored(self, made: HandedOn, store: Store) -> HandedOn:
        """The same with all tensors in a store; those that the micro-batch had before are there already."""
        where = {id(x): known for known, x in self._tensors.items()}

        def leaf(x: Tensor) -> Stored:
            if id(x) not in where:
                where[id(x)] = store.put(x)
            return where[id(x)]

        return HandedOn(*rebuilt((made.values, made.boxes), leaf))


@dataclass
class BlockOutput:
    """What a block has returned for one micro-batch.

    Attributes:
        hidden: the hidden states.
        returned: all of it.
        inputs: what the block was given, as it is after the run.
    """

    hidden: Tensor
    returned: Any
    inputs: BlockInputs


@dataclass
class HiddenStates:
    """Micro-batches of windows between two blocks of a model.

    Attributes:
        model: whose blocks run.
        store: where all tensors of the micro-batches are.
        hidden: per micro-batch, the input of the next block, (batch, seqlen, d) in most models; or the stream at a
            later point of it.
        calls: per micro-batch and block, what the model's forward gives the block.
        constants: per micro-batch, the tensors that it makes before its first block. All streams share them.
        carried: per micro-batch, what blocks before hand on to later ones.
        flow: how blocks hand tensors on.
        windows: number of windows in each micro-batch.
        of_batch: numbers of the constants that depend on what the forward is given.
        position: the point of the block at which `hidden` is.
        kept: a later point of the block that runs begin at, and its tensors; None: they begin at `position`.
        unchecked: pending NaN check: block, micro-batch, and whether it is finite, which is read one step late so that
            the host does not wait for the GPU.
    """

    model: BlockModel
    store: Store
    hidden: Activations
    calls: list[dict[int, Call]]
    constants: list[list[Stored]]
    carried: list[HandedOn]
    flow: Flow
    windows: list[int] = field(default_factory=list)
    of_batch: set[int] = field(default_factory=set)
    position: Point = INPUT
    kept: tuple[Point, Activations] | None = None
    unchecked: tuple[int, int, OnItsWay] | None = None

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.hidden)

    def fork(self) -> "HiddenStates":
        """A copy that runs independently."""
        return replace(
            self, hidden=self.hidden.fork(), carried=[*self.carried], position=INPUT, kept=None, unchecked=None
        )

    def go_back(self, start: "HiddenStates") -> None:
        """Become what a fork of these micro-batches is, at the input of a block."""
        self.hidden, self.carried, self.position, self.kept = start.hidden, start.carried, INPUT, None

    def close(self) -> None:
        """Let all tensors go."""
        self.hidden.clear()
        self.carried, self.constants, self.kept = [], [], None

    def inputs(self, i: int, j: int) -> BlockInputs:
        """What micro-batch j gives block i beside the hidden states."""
        if self.store.pins and j + 1 < len(self):
            following, call = self.carried[j + 1], self.calls[j + 1][i]
            for leaf in leaves_of([following.values, following.boxes, call.args, call.kwargs]):
                if isinstance(leaf, Stored | Constant):
                    (self.constants[j + 1][leaf.number] if isinstance(leaf, Constant) else leaf).fetch()
        return BlockInputs(self.calls[j][i], self.constants[j], self.carried[j])

    def call(
        self, i: int, j: int, hidden: Tensor, block: nn.Module | None = None, inputs: BlockInputs | None = None
    ) -> Any:
        """Run block i, or another module in its place, on a tensor in the place of micro-batch j.

        Args:
            i, j: number of the block and of the micro-batch.
            hidden: the tensor.
            block: the other module.
            inputs: from `inputs`, if they are there already. Then no torch function is called but by the block.
        """
        with explained(type(self.model.model).__name__, self.model.names[i], self.model.input_kind):
            return (inputs or self.inputs(i, j)).run(block or self.model.blocks[i], hidden)

    def behind_last(self, j: int) -> dict[int, Tensor]:
        """The tensors of micro-batch j that are read behind the last block, beside its hidden states."""
        return {number: self.carried[j].values[number].read() for number in self.flow.end}

    def beside(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the first micro-batch beside its hidden states: what blocks have handed on, and constants.

        Of the constants only those that depend on what the forward is given: they differ from window to window.
        """
        stored = dict.fromkeys(leaves_of([self.carried[0].values, self.carried[0].boxes]))
        handed_on = [x.read() for x in stored if x not in self.constants[0]]
        return handed_on, [self.constants[0][n].read() for n in sorted(self.of_batch)]

    def handed_on(self, i: int, inputs: BlockInputs, returned: Any) -> list[Tensor]:
        """The tensors of a run of block i that later blocks are given, beside the hidden states."""
        held = inputs.handed_on(returned, self.flow.live.get(i, []))
        return tensors_of([held.values, held.boxes])

    def part(
        self, i: int, j: int, block: nn.Module | None = None, *, take: Iterable[Point] = (), end: Point | None = None
    ) -> tuple[dict[Point, Tensor], BlockOutput | None]:
        """Run micro-batch j from where it is through a part of block i, or of another module in its place.

        Args:
            i, j: number of the block and of the micro-batch.
            block: the other module.
            take, end: as in `run_part`.

        Returns:
            The wanted tensors, and what the block returned; None if the run ended before.

        Raises:
            InputError: as `run_part`; or the block writes to a tensor that it is given.
        """
        given = {self.position: self.hidden[j]}
        if self.kept:
            given[self.kept[0]] = self.kept[1][j]
        inputs = self.inputs(i, j)
        versions = inputs.versions()
        taken, returned = run_part(lambda hidden: self.call(i, j, hidden, block, inputs), given, take, end)
        if inputs.versions() != versions:
            # Other streams are given it, too.
            raise InputError(f"{self.model.names[i]}: {UNSUPPORTED}: the block writes to a tensor that it is given")
        return taken, None if returned is None else BlockOutput(hidden_of(returned), returned, inputs)

    def output(self, i: int, j: int, block: nn.Module | None = None) -> BlockOutput:
        """What block i, or another module in its place, returns for micro-batch j."""
        _, output = self.part(i, j, block)
        assert output is not None
        return output

    def advance(self, i: int, block: nn.Module | None = None) -> None:
        """Run all micro-batches through block i, or another module in its place; they are then the next block's input.

        Raises:
            InputError: an output holds NaN or Inf.
        """
        for j in range(len(self)):
            self.leave(i, j, self.output(i, j, block))
        self.arrive(INPUT)

    def leave(self, i: int, j: int, output: BlockOutput) -> None:
        """Move micro-batch j on to the input of the block behind block i, with all that later blocks are given.

        Raises:
            InputError: the block returned something else than others of its class; or as `put`.
        """
        if _form_of(output.returned) != _form_of(self.calls[j][i].form):
            raise InputError(
                f"{self.model.names[i]}: {UNSUPPORTED}: it does not return the same as other blocks of its class"
            )
        with torch.no_grad():
            made, hidden = self._made(i, j, output)
        made = HandedOn({number: made.values[number] for number in self.flow.live[i]}, made.boxes)
        if any(x.is_meta for x in tensors_of([made.values, made.boxes])):
            raise InputError(CANNOT_GO_ON)
        self.carried[j] = output.inputs.stored(made, self.store)
        self.put(i, j, hidden)

    def _made(self, i: int, j: int, output: BlockOutput) -> tuple[HandedOn, Tensor]:
        """All tensors of micro-batch j when the block behind block i begins, and the input of that block."""
        call, following = self.calls[j][i], self.calls[j].get(i + 1)
        made = output.inputs.handed_on(output.returned, [*range(call.after)])
        if following is None:
            return made, output.hidden
        made = HandedOn(output.inputs.made_by(following.steps, made.values), made.boxes)
        first = following.hidden
        return made, output.inputs.tensor(first) if isinstance(first, Constant) else made.values[first.number]

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
        inputs = self.inputs(i, j)
        returned = self.call(i, j, self.hidden[j], inputs=inputs)
        return self._made(i, j, BlockOutput(hidden_of(returned), returned, inputs))[1]

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
        finite = OnItsWay(all_finite(out))
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
