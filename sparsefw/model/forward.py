"""Run the model's own forward with something else in place of its blocks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparsefw.model.explained import StopForward, explained
from sparsefw.model.streamed import StreamedModel

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
            return model.model(input_ids=ids.to(model.device), use_cache=False)
    except StopForward:
        return None
    finally:
        for block in model.blocks:
            del block.forward


def as_block_output(model: StreamedModel, hidden: Tensor) -> Any:
    """Hidden states in the form in which the model's blocks return them."""
    return (hidden, None) if model.blocks_return_tuple else hidden


def hidden_of(block_output: Any) -> Tensor:
    """The hidden states among what a block returned."""
    return block_output[0] if isinstance(block_output, tuple) else block_output
