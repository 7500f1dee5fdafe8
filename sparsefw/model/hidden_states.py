"""Hidden states on their way through the blocks of a model, in micro-batches.

The model's own forward tells what every block receives (masks, rotary tables, per-layer windows), so that no
architecture is named here. `embed` records it; later the blocks run one by one with what was recorded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.data import Batch, token_batch
from sparsefw.errors import InputError
from sparsefw.finite import OnItsWay, all_finite, check_finite
from sparsefw.model.activations import Activations, DeviceActivations
from sparsefw.model.block_model import BlockModel
from sparsefw.model.carried import Carried, Constants, Held
from sparsefw.model.explained import explained
from sparsefw.model.flow import Call, Flow
from sparsefw.model.forward import record
from sparsefw.model.inputs import BlockInputs
from sparsefw.model.parts import CANNOT_GO_ON, DIFFERS, INPUT, UNSUPPORTED, Point, run_part
from sparsefw.model.stand_ins import hidden_of
from sparsefw.model.values import Constant, Value, leaves_of, outline, rebuilt, tensors_of


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
        new_activations: makes an empty list of micro-batches.
        hidden: per micro-batch, the input of the next block, (batch, seqlen, d) in most models; or the stream at a
            later point of it.
        calls: per micro-batch and block, what the model's forward gives the block.
        constants: the tensors that it makes before its first block.
        carried: what blocks before hand on to later ones.
        flow: how blocks hand tensors on.
        windows: number of windows in each micro-batch.
        form: shape and dtype of the first micro-batch.
        fresh: those of the next block, where these have another form: its first ones, of the micro-batches so far.
        position: the point of the block at which `hidden` is.
        kept: a later point of the block that runs begin at, and its tensors; None: they begin at `position`.
        unchecked: pending NaN check: block, micro-batch, and whether it is finite, which is read one step late so that
            the host does not wait for the GPU.
    """

    model: BlockModel
    new_activations: Callable[..., Activations]
    hidden: Activations
    calls: list[dict[int, Call]]
    constants: Constants
    carried: Carried
    flow: Flow
    windows: list[int] = field(default_factory=list)
    form: tuple[torch.Size, torch.dtype] | None = None
    fresh: Activations | None = None
    position: Point = INPUT
    kept: tuple[Point, Activations] | None = None
    unchecked: tuple[int, int, OnItsWay] | None = None

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.hidden)

    def fork(self) -> "HiddenStates":
        """A copy that runs independently."""
        return replace(
            self,
            hidden=self.hidden.fork(),
            constants=self.constants.fork(),
            carried=self.carried.fork(),
            position=INPUT,
            kept=None,
            unchecked=None,
        )

    def go_back(self, start: "HiddenStates") -> None:
        """Become what a fork of these micro-batches is, at the input of a block. The fork is used up."""
        self.drop_kept()
        for mine in (self.hidden, self.carried, start.constants):
            mine.close()
        self.hidden, self.carried, self.form, self.position = start.hidden, start.carried, start.form, INPUT

    def close(self) -> None:
        """Release the threads and files of the activations; the hidden states are gone."""
        self.drop_kept()
        self.hidden.close()
        if self.fresh is not None:
            self.fresh.close()
        self.carried.close()
        self.constants.close()

    def replace(self, hidden: Iterable[Tensor]) -> None:
        """Put other tensors in the place of all micro-batches, between two blocks; they may have another form.

        The old ones are let go first, so that memory never has both.

        Args:
            hidden: the tensors, on the device, one for each micro-batch.
        """
        assert self.position == INPUT
        self.drop_kept()
        self.hidden.close()
        self.hidden, self.form, self.unchecked = self.new_activations(), None, None
        for x in hidden:
            self.form = self.form or _form_of_tensor(x)
            self.hidden.append(x)
        assert len(self) == len(self.windows)

    def drop_kept(self) -> None:
        """Let the tensors of the later point go."""
        if self.kept:
            self.kept[1].close()
            self.kept = None

    def inputs(self, i: int, j: int) -> BlockInputs:
        """What micro-batch j gives block i beside the hidden states."""
        return BlockInputs(j, self.calls[j][i], self.constants, self.carried)

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
        with explained(type(self.model.model).__name__, self.model.names[i], self.model.given):
            return (inputs or self.inputs(i, j)).run(block or self.model.blocks[i], hidden)

    def behind_last(self, j: int) -> dict[int, Tensor]:
        """The tensors of micro-batch j that are read behind the last block, beside its hidden states."""
        values = self.carried.held(j).values
        return {number: self.carried.tensor(j, values[number]) for number in self.flow.end}

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
        held = Held({number: made.values[number] for number in self.flow.live[i]}, made.boxes)
        if any(x.is_meta for x in tensors_of([held.values, held.boxes])):
            raise InputError(CANNOT_GO_ON)
        self.carried.put(j, held, output.inputs.known)
        self.put(i, j, hidden)

    def _made(self, i: int, j: int, output: BlockOutput) -> tuple[Held, Tensor]:
        """All tensors of micro-batch j when the block behind block i begins, and the input of that block."""
        call, following = self.calls[j][i], self.calls[j].get(i + 1)
        made = output.inputs.handed_on(output.returned, [*range(call.after)])
        if following is None:
            return made, output.hidden
        made = Held(output.inputs.made_by(following.steps, made.values), made.boxes)
        first = following.hidden
        return made, self.constants[j, first.number] if isinstance(first, Constant) else made.values[first.number]

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
        self.drop_kept()
        self.position, self.kept = position, kept
        self.carried.settle()
        self.settle()
        if self.fresh is not None:
            self.hidden.close()
            self.hidden, self.fresh = self.fresh, None

    def put(self, i: int, j: int, out: Tensor) -> None:
        """Replace micro-batch j by what it is at a later point of block i, or behind it.

        It is checked after the next one has been launched, or by `settle`: a GPU would wait otherwise while the
        host prepares the next one. Only one check is pending at a time, so that no more micro-batches stay in memory.

        Raises:
            InputError: the micro-batch before holds NaN or Inf.
        """
        if not j and _form_of_tensor(out) != self.form:
            # What follows has another form, as a decoder behind an encoder has.
            self.fresh, self.form = self.new_activations(), _form_of_tensor(out)
        if self.fresh is None:
            self.hidden[j] = out
        else:
            self.fresh.append(out)
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
                hidden = self.hidden if self.fresh is None else self.fresh
                check_finite(f"activations after {self.model.names[i]}", hidden[j])


def embed(
    model: BlockModel,
    ids: Tensor,
    batch_size: int,
    new_activations: Callable[..., Activations] = DeviceActivations,
) -> HiddenStates:
    """Embed windows of tokens (windows, seqlen), `batch_size` of them in a micro-batch. As `embed_batches`."""
    return embed_batches(model, map(token_batch, ids.split(batch_size)), new_activations)


def check_token(token: int, vocabulary: int | None) -> None:
    """Refuse the largest token of a text if the model has no embedding for it.

    Args:
        token: the token.
        vocabulary: number of the tokens that the model embeds; None: it may read something else.
    """
    if vocabulary is not None and token >= vocabulary:
        raise InputError(f"token {token}: the model embeds {vocabulary} tokens; give those of its own tokenizer")


@torch.no_grad()
def embed_batches(
    model: BlockModel, batches: Iterable[Batch], new_activations: Callable[..., Activations] = DeviceActivations
) -> HiddenStates:
    """Embed batches, and record what the model passes to every block.

    Args:
        model: the model.
        batches: arguments of its forward, for each micro-batch.
        new_activations: makes an empty list of micro-batches.

    Raises:
        InputError: the model has no embedding for a token, weights hold NaN or Inf, or its blocks hand tensors on in a
            way that cannot be followed.
    """
    vocabulary = model.vocabulary
    with model.outside():
        flow, constants, carried = model.flow, Constants(new_activations), Carried(new_activations)
        states = HiddenStates(model, new_activations, new_activations(), [], constants, carried, flow)
        for batch in batches:
            if vocabulary is not None:
                # Other models read no tokens.
                check_token(max(int(ids.max()) for ids in batch.tensors), vocabulary)
            recording = record(model, batch)
            if recording.signature != flow.signature:
                raise InputError(DIFFERS)
            if not states.windows:
                states.form = _form_of_tensor(recording.hidden)
            states.windows.append(batch.windows)
            states.hidden.append(recording.hidden)
            states.calls.append(recording.calls)
            constants.append(recording.constants, recording.of_batch)
            carried.append(recording.boxes)
    return states


def _form_of_tensor(x: Tensor) -> tuple[torch.Size, torch.dtype]:
    return x.shape, x.dtype


def _form_of(returned: Any) -> list[Any]:
    return outline(rebuilt(returned, lambda _: "tensor"))
