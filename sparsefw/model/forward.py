"""Run the model's own forward with something else in place of its blocks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.model.explained import StopForward, explained
from sparsefw.model.flow import Form, Recording
from sparsefw.model.parts import UNSUPPORTED
from sparsefw.model.recording import Recorder, Substitution
from sparsefw.model.streamed import StreamedModel
from sparsefw.model.values import leaves_of, rebuilt

# Stands for a block: called with the block's number, the hidden states, and the block's other arguments.
Replacement = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Any]


def run_with_blocks_replaced(model: StreamedModel, ids: Tensor, replacement: Replacement) -> Any:
    """Run the model's own forward.

    Args:
        model: the model, inside `StreamedModel.outside`, which puts the weights outside of the blocks on the device.
        ids: (windows, seqlen) tokens.
        replacement: called for every block, returns what the block would.

    Returns:
        What the model returns; None if the replacement raised `StopForward`.

    Raises:
        InputError: the model's code outside of its blocks fails.
    """
    for i, block in enumerate(model.blocks):
        block.forward = lambda hidden, *args, _i=i, **kwargs: replacement(_i, hidden, args, kwargs)
    try:
        with explained(type(model.model).__name__, "its forward outside of the blocks"):
            return model.runs(input_ids=ids.to(model.device), use_cache=False)
    except StopForward:
        return None
    finally:
        for block in model.blocks:
            del block.forward


def hidden_of(block_output: Any) -> Tensor:
    """The hidden states among what a block returned."""
    return block_output[0] if isinstance(block_output, tuple | list) else block_output


def form_of(model: StreamedModel, i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
    """What block i returns. The class does not tell, so one block of each class is run.

    Args:
        model: the model.
        i: number of the block.
        hidden, args, kwargs: its input, and its other arguments, which stay as they are.

    Raises:
        InputError: the hidden states are not the first of what it returns.
    """
    kind = type(model.blocks[i])
    known = model.forms.get(kind)
    if known is None or not (known.only_hidden or known.shape == hidden.shape):
        block = model.open_as(i, model.read(i))
        # Copies: what the block changes in them, it changes again when it is run.
        args, kwargs = rebuilt((args, kwargs), lambda x: x)
        with explained(type(model.model).__name__, model.names[i]):
            output = kind.forward(block, hidden, *args, **kwargs)
        model.close(i)
        leaves = leaves_of(output)
        if not leaves or leaves[0] is not hidden_of(output):
            raise InputError(
                f"{model.names[i]}: {UNSUPPORTED} {type(model.model).__name__}: the block returns a "
                f"{type(output).__name__} that does not begin with the hidden states"
            )
        # The hidden states are given anew each time.
        others = iter([hidden.to("meta"), *leaves[1:]])
        known = model.forms[kind] = Form(rebuilt(output, lambda _: next(others)), hidden.shape)
    return known


def record(model: StreamedModel, ids: Tensor, last: int | None = None) -> Recording:
    """Record the model's forward.

    Args:
        model: the model, inside `StreamedModel.outside`.
        ids: (windows, seqlen) tokens.
        last: number of the block that the forward ends at; None: all of it is run.

    Raises:
        InputError: its blocks hand tensors on in a way that cannot be followed.
    """
    ids = ids.to(model.device)
    weights = {
        f"{name}.{inner}": weight
        for name, block in zip(model.names, model.blocks, strict=True)
        for inner, weight in block.named_parameters()
    }
    recorder = Recorder(model.names, type(model.model).__name__, ids, weights)

    def replacement(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with recorder.pause():
            output = _stand_in(model, recorder, i, hidden, args, kwargs)
        if i == last:
            raise StopForward
        return output

    with recorder:
        run_with_blocks_replaced(model, ids, replacement)
    return recorder.recording()


def run_behind_blocks(model: StreamedModel, ids: Tensor, hidden: Tensor, others: dict[int, Tensor]) -> Any:
    """Run what lies behind the last block.

    Args:
        model: the model, inside `StreamedModel.outside`, with its flow.
        ids: (windows, seqlen) tokens.
        hidden: what the last block returns.
        others: the other tensors that are read there, by their numbers in the recording.

    Returns:
        What the model returns.
    """
    ids, flow = ids.to(model.device), model.flow
    assert flow is not None
    recorder = Substitution(model.names, type(model.model).__name__, ids, others)

    def replacement(i: int, before: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with recorder.pause():
            recorder.begun = i == flow.blocks[-1]
            output = hidden if recorder.begun else before
            if flow.by_window:
                # Nobody reads the other stand-ins, whose shape may be another one.
                return model.forms[type(model.blocks[i])].around(output)
            return _stand_in(model, recorder, i, before, args, kwargs, output)

    with recorder:
        return run_with_blocks_replaced(model, ids, replacement)


def _stand_in(
    model: StreamedModel,
    recorder: Recorder,
    i: int,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor | None = None,
) -> Any:
    """What stands for the output of block i in a forward that is recorded.

    Args:
        model, recorder: the model and its recorder.
        i: number of the block.
        hidden, args, kwargs: its input, and its other arguments.
        output: the hidden states that it returns; None: its input.
    """
    recorder.arrives(i, hidden, args, kwargs)
    stand_in = form_of(model, i, hidden, args, kwargs).around(hidden if output is None else output)
    recorder.leaves(i, stand_in)
    return stand_in
