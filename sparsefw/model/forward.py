"""Run an opened model's own forward with stubs in place of its blocks: the part up to the last block, or after it.

The arguments that the forward gives every block (masks, rotary tables, attention windows) are traced, so that no
architecture is named here.
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
from sparsefw.model.stubs import BATCHES, Template, run_with_stubs
from sparsefw.model.trace import Call, Trace, Values, replay
from sparsefw.model.tracer import Tracer


def template_of(model: BlockModel, i: int, args: tuple, kwargs: dict) -> Template:
    """The template of what block i returns. If there is none for the block's type, the block runs to show its output.

    Args:
        model: the model.
        i: number of the block.
        args, kwargs: the block's arguments, the hidden states first. They are not changed.

    Raises:
        InputError: the block returns no tensor.
    """
    hidden, *others = args
    if (known := model.templates.find(model.block_types[i], hidden)) is None:
        with model.set_aside(i), model.explained(model.names[i]):
            block = model.open_alone(i)
            # The block gets copies of objects: only its real run later may change the objects themselves.
            others, kwargs = rebuilt((others, kwargs), lambda x: x)
            output = block(hidden, *others, **kwargs)
        known = model.templates.add(model.block_types[i], output, hidden, model.names[i], model.class_name)
    return known


def trace_forward(model: BlockModel, batch: Batch) -> Trace:
    """Trace the model's forward up to its last block.

    Args:
        model: the model; call this inside `BlockModel.outside_loaded`.
        batch: arguments of the forward.

    Raises:
        InputError: the forward fails, calls the blocks in another order, or passes tensors on in an unknown way.
    """
    batch, last = batch.to(model.device, model.in_fp32), len(model.blocks) - 1
    tracer = Tracer(model.class_name, batch.tensors)

    def make_stub(i: int, name: str, args: tuple, kwargs: dict) -> Any:
        if model.names[i] != name:
            raise InputError(DIFFERS)
        return template_of(model, i, args, kwargs).after(args[0])

    run_with_stubs(model.runs, model.blocks_by_name, batch, model.input_kind, make_stub, tracer, last)
    return tracer.trace(model.flow.end)


def embed(model: BlockModel, ids: Tensor, batch_size: int, store: Store | None = None) -> HiddenStates:
    """Embed windows of tokens (windows, seqlen), with `batch_size` windows in a micro-batch, see `embed_batches`."""
    return embed_batches(model, map(token_batch, ids.split(batch_size)), store)


def check_token(token: int, vocabulary: int | None) -> None:
    """Refuse the largest token of a text if the model has no embedding for it.

    Args:
        token: the token.
        vocabulary: number of the tokens that the model embeds; None: the model may read other input than tokens.
    """
    if vocabulary is not None and token >= vocabulary:
        raise InputError(
            f"token {token}: the model embeds {vocabulary} tokens; give tokens of the model's own tokenizer"
        )


@torch.no_grad()
def embed_batches(
    model: BlockModel, batches: Iterable[Batch], store: Store | None = None, pieces: Iterable[Batch] = ()
) -> HiddenStates:
    """Embed batches, and trace the arguments that the model's forward gives every block.

    The forward is traced for every batch, since its Python code may depend on the batch's lengths, masks and values.

    Args:
        model: the model.
        batches: arguments of the model's forward, for each micro-batch.
        store: store for the hidden states; None: they stay on the model's device.
        pieces: one batch for each size of the pieces that micro-batches are cut into, see `HiddenStates.some`.

    Raises:
        InputError: the model has no embedding for a token, weights hold NaN or Inf, or the tensors between blocks
            cannot be traced.
    """
    vocabulary, store = model.vocabulary, store or Store(model.device)
    states = HiddenStates(model, Activations(store))
    first: dict[int, Stored] | None = None
    with model.outside_loaded():
        for batch in batches:
            if vocabulary is not None:
                # With a vocabulary, the tensors of a batch are tokens.
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
    """A micro-batch before the first block. A constant that equals the first micro-batch's is not stored again."""
    constants = {}
    for n, x in trace.constants.items():
        known = first[n]
        same = (x.shape, x.dtype) == (known.kept.shape, known.kept.dtype) and torch.equal(x, known.kept)
        constants[n] = known if same else store.put(x)
    return MicroBatch(batch.windows, batch.name, trace.calls, constants, trace.objects)


def _arguments(model: BlockModel, i: int, call: Call) -> dict[str, Any]:
    """The arguments of block i without its hidden states, by the parameter names of the block's forward."""
    names = [*inspect.signature(model.blocks[i].forward).parameters][1:]
    return dict(zip(names, call.args, strict=False)) | call.kwargs


def _find_padding(model: BlockModel, trace: Trace) -> None:
    """Find the padding of a micro-batch from the attention masks among each block's arguments; sets `Call.unpadded`."""
    for i, call in trace.calls.items():
        masks = (
            (name, trace.constants[x.number])
            for name, x in _arguments(model, i, call).items()
            # A mask of cross-attention is for the positions of the other sequence.
            if isinstance(x, ConstantRef) and re.search("^(?!.*(encoder|cross|memory)).*(attention|padding)_mask", name)
        )
        # In torch's own layers, true means that a position is padding.
        call.unpadded = unpadded_of(~x if x.dtype == torch.bool and "padding" in name else x for name, x in masks)


def _difference(model: BlockModel, batch: Batch, states: HiddenStates, trace: Trace) -> str:
    """Say in one line how the traced forward of a batch differs from that of the first batch."""
    # Without an earlier batch, the batch differs from the input with which the model was opened.
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
    model: BlockModel, batch: Batch, hidden: Tensor | None, others: Values, tracer: Tracer | None = None
) -> Any:
    """Run the part of the model's forward that comes after the last block.

    Args:
        model: the model; call this inside `BlockModel.outside_loaded`.
        batch: arguments of the forward.
        hidden: the last block's output; None: a stub. With `Trace.by_window` it gets gradients.
        others: the other tensors of blocks that this part reads, by their numbers in the trace.
        tracer: traces the forward; only with `Trace.by_window`.

    Returns:
        The output of the model.
    """
    batch, last, by_window = batch.to(model.device, model.in_fp32), len(model.blocks) - 1, model.flow.by_window
    if not by_window:
        tracer = Tracer(model.class_name, batch.tensors)

    def make_stub(i: int, name: str, args: tuple, kwargs: dict) -> Any:
        # With `by_window` only hidden states are read, so a template with other tensors of another shape will do.
        template = model.templates.find(model.block_types[i], args[0], any_shape=True) if by_window else None
        template = template or template_of(model, i, args, kwargs)
        if tracer and not by_window and i == last:
            tracer.real = others
        if i < last or hidden is None:
            return template.after(args[0])
        # A view passes gradients to `hidden`.
        return template.around(hidden, lambda x: x.view_as(x))

    return run_with_stubs(model.runs, model.blocks_by_name, batch, model.input_kind, make_stub, tracer)


def logits_after_blocks(model: BlockModel, batch: Batch, hidden: Tensor) -> Any:
    """The logits in the output of `run_after_blocks`, with the same bits; None: there are no logits.

    A model's whole forward is slow even with stubs. So it runs once for each shape of the inputs. The steps after the
    last block are traced then, and replayed as long as the weights outside of the blocks are loaded. If these steps
    depend on the batch, or cannot be traced, the model's forward runs each time.

    Args:
        model, batch: as for `run_after_blocks`; the model's trace has `Trace.by_window`.
        hidden: the last block's output. It gets gradients.
    """
    shapes = hidden.shape, *(x.shape for x in batch.tensors)
    if again := model.after_blocks.get(shapes):
        return again(hidden)
    known = shapes in model.after_blocks or model.flow.batch_after
    tracer = None if known else Tracer(model.class_name, batch.tensors)
    logits = getattr(run_after_blocks(model, batch, hidden, {}, tracer), "logits", None)
    if tracer:
        model.after_blocks[shapes] = _logits_again(tracer, len(model.blocks), logits)
    return logits


def _logits_again(tracer: Tracer, count: int, logits: Any) -> Callable[[Tensor], Tensor] | None:
    """A function that computes logits from the last block's output by a replay; None: the steps cannot be replayed.

    `count` is the number of blocks.
    """
    try:
        # The tracer takes the logits for the input of one more block.
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
