"""Hidden states on their way through the blocks of a model, in micro-batches.

The model's own forward tells what every block receives (masks, rotary tables, per-layer windows), so that no
architecture is named here. `embed` records it; later the blocks run one by one with what was recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.finite import all_finite, check_finite
from sparsefw.model.activations import Activations, DeviceActivations
from sparsefw.model.forward import StopForward, as_block_output, hidden_of, run_with_blocks_replaced
from sparsefw.model.streamed import StreamedModel

# Arguments that the model passes to a block beside the hidden states: args and kwargs.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class HiddenStates:
    """Micro-batches of windows between two blocks of a model.

    Attributes:
        model: whose blocks run.
        hidden: per micro-batch, the input of the next block, (batch, seqlen, d).
        calls: per micro-batch and block, the block's other arguments; equal tensors are stored once.
        unchecked: pending NaN check: (block, micro-batch, finite flag on the device), read one step late so that the
            host does not wait for the GPU.
    """

    model: StreamedModel
    hidden: Activations
    calls: list[list[Arguments]]
    unchecked: tuple[int, int, Tensor] | None = None

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.hidden)

    def fork(self) -> "HiddenStates":
        """A copy that runs independently."""
        return HiddenStates(self.model, self.hidden.fork(), self.calls)

    def close(self) -> None:
        """Release the threads and files of the activations; the hidden states are gone."""
        self.hidden.close()

    @torch.no_grad()
    def output(self, i: int, j: int, block: nn.Module | None = None) -> Tensor:
        """Micro-batch j after block i, or after another module in its place; (batch, seqlen, d)."""
        args, kwargs = self.calls[j][i]
        return hidden_of((block or self.model.blocks[i])(self.hidden[j], *args, **kwargs))

    def advance(self, i: int, block: nn.Module | None = None) -> None:
        """Run all micro-batches through block i, or another module in its place; they are then the next block's input.

        Raises:
            InputError: an output holds NaN or Inf.
        """
        for j in range(len(self)):
            self.move(i, j, block)
        self.settle()

    def move(self, i: int, j: int, block: nn.Module | None = None) -> None:
        """Run micro-batch j through block i, or through another module in its place.

        Its output is checked after the next one has been launched, or by `settle`: a GPU would wait otherwise while the
        host prepares the next one. Only one check is pending at a time, so that no more micro-batches stay in memory.

        Raises:
            InputError: the micro-batch moved before holds NaN or Inf.
        """
        out = self.output(i, j, block)
        self.hidden[j] = out
        finite = all_finite(out)
        self.settle()
        self.unchecked = (i, j, finite)

    def settle(self) -> None:
        """Check the micro-batch that was moved last.

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
    new_activations: Callable[[], Activations] = DeviceActivations,
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
    embeddings: Any = model.model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    if ids.max() >= vocabulary:
        raise InputError(f"token {ids.max()}: the model embeds {vocabulary} tokens; give those of its own tokenizer")
    states = HiddenStates(model, new_activations(), [])

    def record(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if model.blocks_return_tuple is None:
            # The class does not tell whether its blocks return a tuple, so a real block is run once.
            block = model.open_as(0, model.read(0))
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
