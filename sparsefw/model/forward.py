"""Run an opened model's own forward with something else in place of its blocks: record it, or run what is behind them.

What it gives every block (masks, rotary tables, per-layer windows) is recorded, so that no architecture is named here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sparsefw.data.batches import Batch, token_batch
from sparsefw.errors import InputError
from sparsefw.model.activations import Activations, Store, Stored
from sparsefw.model.block_model import BlockModel
from sparsefw.model.hidden_states import Carried, HiddenStates
from sparsefw.model.parts import DIFFERS
from sparsefw.model.recorder import Recorder
from sparsefw.model.recording import Recording, rebuilt
from sparsefw.model.stand_ins import Form, explained, run_replaced


def form_of(model: BlockModel, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
    """What block i returns. The class does not tell, so one block of each kind is run.

    Args:
        model: the model.
        i: number of the block.
        args, kwargs: its input, and its other arguments, which stay as they are.

    Raises:
        InputError: it returns no tensor.
    """
    hidden, *others = args
    known = model.forms.find(model.block_types[i], hidden)
    if known is None:
        block = model.open_alone(i)
        # Copies: what the block changes in them, it changes again when it is run.
        others, kwargs = rebuilt((others, kwargs), lambda x: x)
        with explained(type(model.model).__name__, model.names[i], model.input_kind):
            output = block(hidden, *others, **kwargs)
        model.close(i)
        known = model.forms.add(model.block_types[i], output, hidden, model.names[i], type(model.model).__name__)
    return known


def record(model: BlockModel, batch: Batch) -> Recording:
    """Record the model's forward up to its last block.

    Args:
        model: the model, inside `BlockModel.outside`.
        batch: arguments of the forward.

    Raises:
        InputError: its blocks hand tensors on in a way that cannot be followed.
    """
    batch, last = batch.to(model.device, model.in_fp32), len(model.blocks) - 1
    recorder = Recorder(type(model.model).__name__, batch.tensors, dict(zip(model.names, model.blocks, strict=True)))

    def stand_in(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return form_of(model, i, args, kwargs).after(args[0])

    _run(model, batch, stand_in, recorder, last)
    return recorder.recording(model.flow.end)


def _run(
    model: BlockModel,
    batch: Batch,
    stand_in: Callable[[int, tuple, dict], Any],
    recorder: Recorder | None = None,
    last: int | None = None,
) -> Any:
    """As `run_replaced`, for the model's blocks in the order in which they are called.

    Raises:
        InputError: the model's code outside of its blocks fails, or it calls its blocks in another order.
    """

    def in_order(i: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if model.names[i : i + 1] != [name]:
            raise InputError(DIFFERS)
        return stand_in(i, args, kwargs)

    blocks = dict(zip(model.names, model.blocks, strict=True))
    with explained(type(model.model).__name__, "its forward outside of the blocks", model.input_kind):
        return run_replaced(model.runs, blocks, batch, in_order, recorder, last)


def embed(model: BlockModel, ids: Tensor, batch_size: int, store: Store | None = None) -> HiddenStates:
    """Embed windows of tokens (windows, seqlen), `batch_size` of them in a micro-batch. As `embed_batches`."""
    return embed_batches(model, map(token_batch, ids.split(batch_size)), store)


def check_token(token: int, vocabulary: int | None) -> None:
    """Refuse the largest token of a text if the model has no embedding for it.

    Args:
        token: the token.
        vocabulary: number of the tokens that the model embeds; None: it may read something else.
    """
    if vocabulary is not None and token >= vocabulary:
        raise InputError(f"token {token}: the model embeds {vocabulary} tokens; give those of its own tokenizer")


@torch.no_grad()
def embed_batches(model: BlockModel, batches: Iterable[Batch], store: Store | None = None) -> HiddenStates:
    """Embed batches, and record what the model passes to every block.

    Args:
        model: the model.
        batches: arguments of its forward, for each micro-batch.
        store: where hidden states are; None: where the work is.

    Raises:
        InputError: the model has no embedding for a token, weights hold NaN or Inf, or its blocks hand tensors on in a
            way that cannot be followed.
    """
    vocabulary, store = model.vocabulary, store or Store(model.device)
    with model.outside():
        states = HiddenStates(model, store, Activations(store), [], [], model.flow)
        constants = _Constants(store)
        for batch in batches:
            if vocabulary is not None:
                # Other models read no tokens.
                check_token(max(int(ids.max()) for ids in batch.tensors), vocabulary)
            recording = record(model, batch)
            if recording.signature != model.flow.signature:
                raise InputError(DIFFERS)
            if not states.windows:
                states.of_batch = recording.of_batch
            states.windows.append(batch.windows)
            states.hidden.append(recording.hidden)
            states.calls.append(recording.calls)
            constants.append(recording.constants)
            # The list changes until it is known which tensors are equal in all micro-batches.
            states.carried.append(Carried(constants.stored[-1], recording.boxes))
    return states


class _Constants:
    """The tensors that the model's forward makes before its first block, of all micro-batches.

    Those that are equal in all micro-batches are held once, on the device.

    Args:
        store: where the others are.

    Attributes:
        stored: the tensors of each micro-batch.
    """

    def __init__(self, store: Store) -> None:
        self._store, self.stored = store, list[list[Stored]]()
        self._shared: dict[int, Tensor] = {}

    def append(self, tensors: list[Tensor]) -> None:
        """Add the tensors of a micro-batch.

        Raises:
            InputError: there are more or fewer of them than in the first micro-batch.
        """
        if not self.stored:
            self._shared = dict(enumerate(tensors))
            on_device = Store(self._store.device)
            self.stored.append([Stored(on_device, x) for x in tensors])
            return
        if len(tensors) != len(self.stored[0]):
            raise InputError(DIFFERS)
        self.stored.append([self._put(n, x) for n, x in enumerate(tensors)])

    def _put(self, n: int, x: Tensor) -> Stored:
        """Store the n-th tensor of a micro-batch, unless it is equal to that of all before."""
        first = self._shared.get(n)
        alike = first is not None and (x.shape, x.dtype) == (first.shape, first.dtype)
        if first is not None and (x is first or (alike and torch.equal(first, x))):
            return self.stored[0][n]
        self._shared.pop(n, None)
        if first is not None and alike:
            # They differ from micro-batch to micro-batch. One of another form may be the last.
            one = self._store.put(first)
            for before in self.stored:
                before[n] = one
        return self._store.put(x)


def run_behind_blocks(model: BlockModel, batch: Batch, hidden: Tensor | None, others: dict[int, Tensor]) -> Any:
    """Run what lies behind the last block.

    Args:
        model: the model, inside `BlockModel.outside`.
        batch: arguments of the forward.
        hidden: what the last block returns; None: something of its form. Gradients go back to it where windows are run
            by themselves.
        others: the other tensors that are read there, by their numbers in the recording.

    Returns:
        What the model returns.
    """
    batch, last = batch.to(model.device, model.in_fp32), len(model.blocks) - 1
    recorder = None if model.flow.by_window else Recorder(type(model.model).__name__, batch.tensors, {}, others)

    def stand_in(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        form = None
        if recorder is None:
            # Nobody reads the other tensors, whose shape may be another one.
            form = model.forms.like(model.block_types[i], args[0])
        else:
            recorder.begun = i == last
        form = form or form_of(model, i, args, kwargs)
        # A view: gradients go through it.
        return form.after(args[0]) if i < last or hidden is None else form.around(hidden, lambda x: x.view_as(x))

    return _run(model, batch, stand_in, recorder)
