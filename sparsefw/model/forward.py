"""Run an opened model's own forward with something else in place of its blocks: record it, or run what is behind them.

What it gives every block (masks, rotary tables, per-layer windows) is recorded, so that no architecture is named here.
"""

import inspect
import re
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
from sparsefw.model.recording import Call, Constant, Recording, Value, numbers_in, rebuilt, unpadded_of
from sparsefw.model.stand_ins import BATCHES, Form, explained, run_replaced


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
    if (known := model.forms.find(model.block_types[i], hidden)) is None:
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
        InputError: the model's code outside of its blocks fails, it calls its blocks in another order, or they hand
            tensors on in a way that cannot be followed.
    """
    batch, last = batch.to(model.device, model.in_fp32), len(model.blocks) - 1
    blocks = dict(zip(model.names, model.blocks, strict=True))
    recorder = Recorder(type(model.model).__name__, batch.tensors, blocks)

    def stand_in(i: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if model.names[i] != name:
            raise InputError(DIFFERS)
        return form_of(model, i, args, kwargs).after(args[0])

    run_replaced(model.runs, blocks, batch, model.input_kind, stand_in, recorder, last)
    return recorder.recording(model.flow.end)


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
def embed_batches(
    model: BlockModel, batches: Iterable[Batch], store: Store | None = None, pieces: Iterable[Batch] = ()
) -> HiddenStates:
    """Embed batches, and record what the model passes to every block.

    Args:
        model: the model.
        batches: arguments of its forward, for each micro-batch.
        store: where hidden states are; None: where the work is.
        pieces: a batch of each size in which pieces of the micro-batches are run, too, see `HiddenStates.some`.

    Raises:
        InputError: the model has no embedding for a token, weights hold NaN or Inf, or its blocks hand tensors on in a
            way that cannot be followed.
    """
    vocabulary, store = model.vocabulary, store or Store(model.device)
    with model.outside():
        states = HiddenStates(model, store, Activations(store), [], [], model.flow)
        first = list[Stored]()
        for batch in batches:
            if vocabulary is not None:
                # Other models read no tokens.
                check_token(max(int(ids.max()) for ids in batch.tensors), vocabulary)
            recording = record(model, batch)
            if recording.signature != model.flow.signature or (first and len(recording.constants) != len(first)):
                raise InputError(_difference(model, batch, states, recording))
            if not states.windows:
                states.of_batch, on_device = recording.of_batch, Store(model.device)
                first = [Stored(on_device, x) for x in recording.constants]
            states.windows.append(batch.windows)
            states.hidden.append(recording.hidden)
            states.calls.append(recording.calls)
            if model.input_kind == BATCHES:
                _find_padding(model, recording)
            states.names.append(batch.name)
            states.carried.append(Carried(_stored(recording.constants, first, store), recording.boxes))
        for batch in pieces:
            recording = record(model, batch)
            constants = _stored(recording.constants, first, Store(model.device))
            states.pieces[batch.windows] = recording.calls, Carried(constants, recording.boxes)
    return states


def _arguments(model: BlockModel, i: int, call: Call) -> dict[str, Any]:
    """The arguments of block i beside its hidden states, by the names of its parameters."""
    names = [*inspect.signature(model.blocks[i].forward).parameters][1:]
    return dict(zip(names, call.args, strict=False)) | call.kwargs


def _find_padding(model: BlockModel, recording: Recording) -> None:
    """Note the positions of a micro-batch that masks hide from a block, which its layers are not fitted to."""
    for i, call in recording.calls.items():
        masks = (
            (name, recording.constants[x.number])
            for name, x in _arguments(model, i, call).items()
            # Those of a cross-attention are of other positions.
            if isinstance(x, Constant) and re.search("^(?!.*(encoder|cross|memory)).*(attention|padding)_mask", name)
        )
        # In torch's own layers, true means that a position is padding.
        call.unpadded = unpadded_of(~x if x.dtype == torch.bool and "padding" in name else x for name, x in masks)


def _difference(model: BlockModel, batch: Batch, states: HiddenStates, recording: Recording) -> str:
    """Why a batch cannot be run like the first one, in a line."""
    # None is known where the batch differs from what the model was given when it was opened.
    known = states.calls[0] if states.calls else {}
    for i in sorted(known.keys() & recording.calls.keys()):
        first, now = (_arguments(model, i, calls[i]) for calls in (known, recording.calls))
        for name in first | now if batch.name else ():
            if (first.get(name) is None) != (now.get(name) is None):
                either = (
                    f"{batch.name}: {model.names[i]} is given {name} either for this batch or for {states.names[0]}"
                )
                return f"{either}; give all batches the same arguments, such as an attention_mask"
    return f"{batch.name}: {DIFFERS}".removeprefix(": ")


def _stored(tensors: list[Tensor], first: list[Stored], store: Store) -> list[Stored]:
    """The tensors that the model's forward makes of a micro-batch before its first block, in a store.

    Those that are equal to the first micro-batch's, in `first`, are held once.
    """
    found = []
    for x, known in zip(tensors, first, strict=True):
        same = (x.shape, x.dtype) == (known.kept.shape, known.kept.dtype) and torch.equal(x, known.kept)
        found.append(known if same else store.put(x))
    return found


def run_behind_blocks(
    model: BlockModel, batch: Batch, hidden: Tensor | None, others: dict[int, Tensor], recorder: Recorder | None = None
) -> Any:
    """Run what lies behind the last block.

    Args:
        model: the model, inside `BlockModel.outside`.
        batch: arguments of the forward.
        hidden: what the last block returns; None: something of its form. Gradients go back to it where windows are run
            by themselves.
        others: the other tensors that are read there, by their numbers in the recording.
        recorder: records the forward, where windows are run by themselves.

    Returns:
        What the model returns.
    """
    batch, last, by_window = batch.to(model.device, model.in_fp32), len(model.blocks) - 1, model.flow.by_window
    if not by_window:
        recorder = Recorder(type(model.model).__name__, batch.tensors, {}, others)

    def stand_in(i: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # By windows nobody reads the other tensors, whose shape may be another one.
        form = model.forms.like(model.block_types[i], args[0]) if by_window else None
        form = form or form_of(model, i, args, kwargs)
        if recorder and not by_window:
            recorder.begun = i == last
        # A view: gradients go through it.
        return form.after(args[0]) if i < last or hidden is None else form.around(hidden, lambda x: x.view_as(x))

    blocks = dict(zip(model.names, model.blocks, strict=True))
    return run_replaced(model.runs, blocks, batch, model.input_kind, stand_in, recorder)


def logits_behind_blocks(model: BlockModel, batch: Batch, hidden: Tensor) -> Any:
    """The logits of what `run_behind_blocks` returns, with the same bits; None: there are none.

    The model's forward goes through stand-ins of all blocks. So it runs once for each shape: the calls behind the last
    block are recorded, and made again as long as the weights outside of the blocks are there. What is made there of the
    batch, or in a way that cannot be followed, takes the model's forward each time.

    Args:
        model, batch: as for `run_behind_blocks`; windows are run by themselves.
        hidden: what the last block returns. Gradients go back to it.
    """
    shapes = hidden.shape, *(x.shape for x in batch.tensors)
    if again := model.behind_blocks.get(shapes):
        return again(hidden)
    known = shapes in model.behind_blocks or model.flow.batch_behind
    recorder = None if known else Recorder(type(model.model).__name__, batch.tensors, {})
    logits = getattr(run_behind_blocks(model, batch, hidden, {}, recorder), "logits", None)
    if recorder:
        model.behind_blocks[shapes] = _again(recorder, len(model.blocks), logits)
    return logits


def _again(recorder: Recorder, count: int, logits: Any) -> Callable[[Tensor], Tensor] | None:
    """Makes logits of what the last of so many blocks returns, as was recorded; None: they cannot be made again."""
    try:
        # As if they were what another block is given.
        recorder.arrives(count, "logits", logits, (), {})
        recording = recorder.recording()
    except InputError:
        return None
    first, call, constants = recording.calls[count - 1].outputs[0], recording.calls[count], recording.constants
    read = [numbers_in((step.args, step.kwargs)) for step in call.steps] + [numbers_in(call.hidden)]

    def again(hidden: Tensor) -> Tensor:
        values = {first: hidden}
        for k, step in enumerate(call.steps, 1):
            values.update(step.run(lambda x: values[x.number] if isinstance(x, Value) else constants[x.number]))
            # Logits are large: what is not read any more goes.
            for n in values.keys() - set().union(*read[k:]):
                del values[n]
        return values[call.hidden.number]

    return again if isinstance(call.hidden, Value) else None
