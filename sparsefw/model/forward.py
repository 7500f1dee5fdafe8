"""Run a streamed model's own forward with something else in place of its blocks."""

from typing import Any

from torch import Tensor

from sparsefw.model.explained import StopForward, explained
from sparsefw.model.flow import Form, Recording
from sparsefw.model.recording import Recorder, Substitution
from sparsefw.model.stand_ins import Replacement, form_of_output, run_replaced
from sparsefw.model.streamed import StreamedModel
from sparsefw.model.values import rebuilt


def run_with_blocks_replaced(model: StreamedModel, ids: Tensor, replacement: Replacement) -> Any:
    """Run the model's own forward.

    Args:
        model: the model, inside `StreamedModel.outside`, which puts the weights outside of the blocks on the device.
        ids, replacement: as for `run_replaced`.

    Returns:
        As `run_replaced`.

    Raises:
        InputError: the model's code outside of its blocks fails.
    """
    with explained(type(model.model).__name__, "its forward outside of the blocks"):
        return run_replaced(model.runs, model.blocks, ids.to(model.device), replacement)


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
        known = model.forms[kind] = form_of_output(output, hidden, model.names[i], type(model.model).__name__)
    return known


def record(model: StreamedModel, ids: Tensor) -> Recording:
    """Record the model's forward up to its last block.

    Args:
        model: the model, inside `StreamedModel.outside`.
        ids: (windows, seqlen) tokens.

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

    def replacement(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with recorder.pause():
            output = _stand_in(model, recorder, i, args, kwargs)
        if i == len(model.blocks) - 1:
            raise StopForward
        return output

    with recorder:
        run_with_blocks_replaced(model, ids, replacement)
    return recorder.recording()


def run_behind_blocks(model: StreamedModel, ids: Tensor, hidden: Tensor, others: dict[int, Tensor]) -> Any:
    """Run what lies behind the last block.

    Args:
        model: the model, inside `StreamedModel.outside`.
        ids: (windows, seqlen) tokens.
        hidden: what the last block returns.
        others: the other tensors that are read there, by their numbers in the recording.

    Returns:
        What the model returns.
    """
    ids = ids.to(model.device)
    recorder = Substitution(model.names, type(model.model).__name__, ids, others)

    def replacement(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with recorder.pause():
            recorder.begun = i == len(model.blocks) - 1
            output = hidden if recorder.begun else args[0]
            if model.flow.by_window:
                # Nobody reads the other stand-ins, whose shape may be another one.
                return model.forms[type(model.blocks[i])].around(output)
            return _stand_in(model, recorder, i, args, kwargs, output)

    with recorder:
        return run_with_blocks_replaced(model, ids, replacement)


def _stand_in(
    model: StreamedModel,
    recorder: Recorder,
    i: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor | None = None,
) -> Any:
    """What stands for the output of block i in a forward that is recorded.

    Args:
        model, recorder: the model and its recorder.
        i: number of the block.
        args, kwargs: what it is given, the hidden states first.
        output: the hidden states that it returns; None: its input.
    """
    hidden, *others = args
    recorder.arrives(i, hidden, tuple(others), kwargs)
    stand_in = form_of(model, i, hidden, tuple(others), kwargs).around(hidden if output is None else output)
    recorder.leaves(i, stand_in)
    return stand_in
