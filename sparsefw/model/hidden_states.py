"""Hidden states on their way through the blocks of a model, in micro-batches.

The model's own forward tells what every block receives (masks, rotary tables, per-layer windows), so that no
architecture is named here. `embed` records it; later the blocks run one by one with what was recorded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.finite import all_finite, check_finite
from sparsefw.model.activations import Activations, DeviceActivations
from sparsefw.model.explained import StopForward, explained
from sparsefw.model.forward import as_block_output, hidden_of, run_with_blocks_replaced
from sparsefw.model.parts import INPUT, Point, run_part
from sparsefw.model.streamed import StreamedModel

# Arguments that the model passes to a block beside the hidden states: args and kwargs.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class HiddenStates:
    """Micro-batches of windows between two blocks of a model.

    Attributes:
        model: whose blocks run.
        new_activations: makes an empty list of micro-batches.
        hidden: per micro-batch, the input of the next block, (batch, seqlen, d); or the stream at a later point of it.
        calls: per micro-batch and block, the block's other arguments; equal tensors are stored once.
        position: the point of the block at which `hidden` is.
        kept: a later point of the block that runs begin at, and its tensors; None: they begin at `position`.
        unchecked: pending NaN check: (block, micro-batch, finite flag on the device), read one step late so that the
            host does not wait for the GPU.
    """

    model: StreamedModel
    new_activations: Callable[..., Activations]
    hidden: Activations
    calls: list[list[Arguments]]
    position: Point = INPUT
    kept: tuple[Point, Activations] | None = None
    unchecked: tuple[int, int, Tensor] | None = None

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.hidden)

    def fork(self) -> "HiddenStates":
        """A copy that runs independently."""
        return HiddenStates(self.model, self.new_activations, self.hidden.fork(), self.calls)

    def close(self) -> None:
        """Release the threads and files of the activations; the hidden states are gone."""
        self.drop_kept()
        self.hidden.close()

    def drop_kept(self) -> None:
        """Let the tensors of the later point go."""
        if self.kept:
            self.kept[1].close()
            self.kept = None

    def call(self, i: int, j: int, hidden: Tensor, block: nn.Module | None = None) -> Any:
        """Run block i, or another module in its place, on a tensor in the place of micro-batch j."""
        args, kwargs = self.calls[j][i]
        with explained(type(self.model.model).__name__, self.model.names[i]):
            return (block or self.model.blocks[i])(hidden, *args, **kwargs)

    def part(
        self, i: int, j: int, block: nn.Module | None = None, *, take: Iterable[Point] = (), end: Point | None = None
    ) -> tuple[dict[Point, Tensor], Tensor | None]:
        """Run micro-batch j from where it is through a part of block i, or of another module in its place.

        Args:
            i, j: number of the block and of the micro-batch.
            block: the other module.
            take, end: as in `run_part`.

        Returns:
            The wanted tensors, and the block's output, (batch, seqlen, d); None if the run ended before.
        """
        given = {self.position: self.hidden[j]}
        if self.kept:
            given[self.kept[0]] = self.kept[1][j]
        taken, returned = run_part(lambda hidden: self.call(i, j, hidden, block), given, take, end)
        return taken, None if returned is None else hidden_of(returned)

    def output(self, i: int, j: int, block: nn.Module | None = None) -> Tensor:
        """Micro-batch j after block i, or after another module in its place; (batch, seqlen, d)."""
        _, output = self.part(i, j, block)
        assert output is not None
        return output

    def advance(self, i: int, block: nn.Module | None = None) -> None:
        """Run all micro-batches through block i, or another module in its place; they are then the next block's input.

        Raises:
            InputError: an output holds NaN or Inf.
        """
        for j in range(len(self)):
            self.put(i, j, self.output(i, j, block))
        self.arrive(INPUT)

    def arrive(self, position: Point, kept: tuple[Point, Activations] | None = None) -> None:
        """Note where all micro-batches are now, `INPUT` for the next block's input, and what is kept of them."""
        self.drop_kept()
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
        finite = all_finite(out)
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


@torch.no_grad()
def embed(
    model: StreamedModel,
    ids: Tensor,
    batch_size: int,
    new_activations: Callable[..., Activations] = DeviceActivations,
) -> HiddenStates:
    """Embed windows of tokens and record what the model passes to every block.

    Args:
        model: the model.
        ids: (windows, seqlen) tokens.
        batch_size: windows in a micro-batch.
        new_activations: makes an empty list of micro-batches.

    Raises:
        InputError: the model has no embedding for a token, or weights hold NaN or Inf.
    """
    with explained(type(model.model).__name__, "its embedding"):
        embeddings: Any = model.model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
    if ids.max() >= vocabulary:
        raise InputError(f"token {ids.max()}: the model embeds {vocabulary} tokens; give those of its own tokenizer")
    states = HiddenStates(model, new_activations, new_activations(), [])

    def record(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if model.blocks_return_tuple is None:
            # The class does not tell whether its blocks return a tuple, so a real block is run once.
            block = model.open_as(0, model.read(0))
            with explained(type(model.model).__name__, model.names[0]):
                model.blocks_return_tuple = isinstance(type(block).forward(block, hidden, *args, **kwargs), tuple)
            model.close(0)
        if i == 0:
            states.hidden.append(hidden)
            states.calls.append([])
        first = states.calls[0][i] if len(states.calls) > 1 else None
        states.calls[-1].append(_share_equal((args, kwargs), first))
        if i == len(model.blocks) - 1:
            raise StopForward
        return as_block_output(model, hidden)

    with model.outside():
        for batch in ids.split(batch_size):
            run_with_blocks_replaced(model, batch, record)
    return states


def _share_equal(new: Any, first: Any) -> Any:
    """`new`, with its tensors replaced by those of the first micro-batch, `first`, where the two are equal."""
    if torch.is_tensor(new):
        same = torch.is_tensor(first) and first.shape == new.shape and first.dtype == new.dtype
        return first if same and torch.equal(first, new) else new
    if isinstance(new, tuple | list):
        matches = isinstance(first, tuple | list) and len(first) == len(new)
        return type(new)(_share_equal(item, first[n] if matches else None) for n, item in enumerate(new))
    if isinstance(new, dict):
        return {k: _share_equal(v, first.get(k) if isinstance(first, dict) else None) for k, v in new.items()}
    return new
