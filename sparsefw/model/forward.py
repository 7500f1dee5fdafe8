"""Run an opened model's own forward with stubs in place of its blocks: up to the last block, or after it.

The arguments that it gives every block (masks, rotary tables, windows of a block) are traced, so that no architecture
is named here.
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
from sparsefw.model.hidden_states import HiddenStates, MicroBatch
from sparsefw.model.nested import ConstantRef, ValueRef, rebuilt
from sparsefw.model.padding import unpadded_of
from sparsefw.model.partial_forward import DIFFERS
from sparsefw.model.stubs import BATCHES, Form, explained, run_with_stubs
from sparsefw.model.trace import Call, Trace, replay
from sparsefw.model.tracer import Tracer


def form_of(model: BlockModel, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
    """The form of what block i returns. The class does not tell, so one block of each type is run.

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
        # Copies: the block will change the arguments themselves when it is run.
        others, kwargs = rebuilt((others, kwargs), lambda x: x)
        with explained(type(model.model).__name__, model.names[i], model.input_kind):
            output = block(hidden, *others, **kwargs)
        model.close(i)
        known = model.forms.add(model.block_types[i], output, hidden, model.names[i], type(model.model).__name__)
    return known


def trace_forward(model: BlockModel, batch: Batch) -> Trace:
    """Trace the model's forward up to its last block.

    Args:
        model: the model, inside `BlockModel.outside`.
        batch: arguments of the forward.

    Raises:
        InputError: the model's code outside of its blocks fails, it calls its blocks in another order, or they hand
            tensors on in a way that cannot be followed.
    """
    batch, last = batch.to(model.device, model.in_fp32), len(model.blocks) - 1
    blocks = dict(zip(model.names, model.blocks, strict=True))
    tracer = Tracer(type(model.model).__name__, batch.tensors)

    def make_stub(i: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if model.names[i] != name:
            raise InputError(DIFFERS)
        return form_of(model, i, args, kwargs).after(args[0])

    run_with_stubs(model.runs, blocks, batch, model.input_kind, make_stub, tracer, last)
    return tracer.trace(model.flow.end)


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
    """Embed batches, and trace what the model's forward gives every block.

    The forward is traced for every batch: its own Python code may do otherwise for other lengths, masks or numbers.

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
    states = HiddenStates(model, Activations(store))
    first: dict[int, Stored] | None = None
    with model.outside():
        for batch in batches:
            if vocabulary is not None:
                # Other models read no tokens.
                check_token(max(int(ids.max()) for ids in batch.tensors), vocabulary)
            trace = trace_forward(model, batch)
            if first is None:
                first = {n: Stored(Store(model.device), x) for n, x in trace.constants.items()}
            if trace.signature != model.flow.signature or trace.constants.keys() != first.keys():
                raise InputError(_difference(model, batch, states, trace))
            if model.input_kind == BATCHES:
                _find_padding(model, trace)
            states.hidden.append(trace.hidden)
            states.batches.append(_micro_batch(batch, trace, first, store))
        for batch in pieces:
            trace = trace_forward(model, batch)
            states.pieces[batch.windows] = _micro_batch(batch, trace, first or {}, Store(model.device))
    return states


def _micro_batch(batch: Batch, trace: Trace, first: dict[int, Stored], store: Store) -> MicroBatch:
    """A micro-batch before the first block. Constants that are equal to the first micro-batch's are held once."""
    constants = {}
    for n, x in trace.constants.items():
        known = first[n]
        same = (x.shape, x.dtype) == (known.kept.shape, known.kept.dtype) and torch.equal(x, known.kept)
        constants[n] = known if same else store.put(x)
    return MicroBatch(batch.windows, batch.name, trace.calls, constants, trace.objects)


def _arguments(model: BlockModel, i: int, call: Call) -> dict[str, Any]:
    """The arguments of block i besides its hidden states, by the names of its parameters."""
    names = [*inspect.signature(model.blocks[i].forward).parameters][1:]
    return dict(zip(names, call.args, strict=False)) | call.kwargs


def _find_padding(model: BlockModel, trace: Trace) -> None:
    """Note the positions of a micro-batch that masks do not hide from a block."""
    for i, call in trace.calls.items():
        masks = (
            (name, trace.constants[x.number])
            for name, x in _arguments(model, i, call).items()
            # Masks of a cross-attention are of other positions.
            if isinstance(x, ConstantRef) and re.search("^(?!.*(encoder|cross|memory)).*(attention|padding)_mask", name)
        )
        # In torch's own layers, true means that a position is padding.
        call.unpadded = unpadded_of(~x if x.dtype == torch.bool and "padding" in name else x for name, x in masks)


def _difference(model: BlockModel, batch: Batch, states: HiddenStates, trace: Trace) -> str:
    """Say in a line why a batch cannot be run like the first one."""
    # The first one itself may differ from what the model was given when it was opened.
    known = states.batches[0] if states.batches and batch.name else MicroBatch()
    for i in sorted(known.calls.keys() & trace.calls.keys()):
        first, now = (_arguments(model, i, calls[i]) for calls in (known.calls, trace.calls))
        for name in first | now:
            if (first.get(name) is None) != (now.get(name) is None):
                return (
                    f"{batch.name}: {model.names[i]} is given {name} either for this batch or for {known.name}; "
                    "give all batches the same arguments, such as an attention_mask"
                )
    return f"{batch.name}: {DIFFERS}".removeprefix(": ")


def run_after_blocks(
    model: BlockModel, batch: Batch, hidden: Tensor | None, others: dict[int, Tensor], tracer: Tracer | None = None
) -> Any:
    """Run the part of the model's forward that comes after the last block.

    Args:
        model: the model, inside `BlockModel.outside`.
        batch: arguments of the forward.
        hidden: the output of the last block; None: something of its form. Gradients go back to it where windows are run
            by themselves.
        others: the other tensors that the forward reads there, by their numbers in the trace.
        tracer: traces the forward, where windows are run by themselves.

    Returns:
        The output of the model.
    """
    batch, last, by_window = batch.to(model.device, model.in_fp32), len(model.blocks) - 1, model.flow.by_window
    if not by_window:
        tracer = Tracer(type(model.model).__name__, batch.tensors)

    def make_stub(i: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # By windows nobody reads the other tensors, whose shape may be another one.
        form = model.forms.find(model.block_types[i], args[0], any_shape=True) if by_window else None
        form = form or form_of(model, i, args, kwargs)
        if tracer and not by_window and i == last:
            tracer.real = others
        # A view: gradients go through it.
        return form.after(args[0]) if i < last or hidden is None else form.around(hidden, lambda x: x.view_as(x))

    blocks = dict(zip(model.names, model.blocks, strict=True))
    return run_with_stubs(model.runs, blocks, batch, model.input_kind, make_stub, tracer)


def logits_after_blocks(model: BlockModel, batch: Batch, hidden: Tensor) -> Any:
    """The logits among what `run_after_blocks` returns, with the same bits; None: there are no logits.

    The model's forward goes through stubs of all blocks. So it runs once for each shape: the steps after the last block
    are traced, and replayed as long as the weights outside of the blocks are there. Where the steps depend on the
    batch, or cannot be followed, the model's forward runs each time.

    Args:
        model, batch: as for `run_after_blocks`; windows are run by themselves.
        hidden: the output of the last block. Gradients go back to it.
    """
    shapes = hidden.shape, *(x.shape for x in batch.tensors)
    if again := model.after_blocks.get(shapes):
        return again(hidden)
    known = shapes in model.after_blocks or model.flow.batch_after
    tracer = None if known else Tracer(type(model.model).__name__, batch.tensors)
    logits = getattr(run_after_blocks(model, batch, hidden, {}, tracer), "logits", None)
    if tracer:
        model.after_blocks[shapes] = _logits_again(tracer, len(model.blocks), logits)
    return logits


def _logits_again(tracer: Tracer, count: int, logits: Any) -> Callable[[Tensor], Tensor] | None:
    """A function that makes the logits of the output of the last block, of `count`; None: they cannot be replayed."""
    try:
        # As if they were the input of another block.
        tracer.before_block(count, "logits", logits, (), {})
        trace = tracer.trace()
    except InputError:
        return None
    last, call = trace.calls[count - 1], trace.calls[count]
    if not isinstance(call.hidden, ValueRef):
        return None

    def again(hidden: Tensor) -> Tensor:
        values = {last.outputs[0]: hidden}
        replay(call.steps, values, trace.constants.__getitem__)
        return values[call.hidden.number]

    return again
