"""Run a model's own forward with something else in place of its blocks."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.model.explained import StopForward
from sparsefw.model.flow import Form
from sparsefw.model.parts import UNSUPPORTED
from sparsefw.model.values import leaves_of, rebuilt

# Stands for a block: called with the block's number and what the block is given.
Replacement = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


def run_replaced(runs: nn.Module, blocks: Sequence[nn.Module], ids: Tensor, replacement: Replacement) -> Any:
    """Run a model's own forward.

    Args:
        runs: the model.
        blocks: its blocks.
        ids: (windows, seqlen) tokens, where the model's weights are.
        replacement: called for every block, returns what the block would.

    Returns:
        What the model returns; None if the replacement raised `StopForward`.
    """
    for i, block in enumerate(blocks):
        block.forward = lambda *args, _i=i, **kwargs: replacement(_i, args, kwargs)
    try:
        return runs(input_ids=ids, use_cache=False)
    except StopForward:
        return None
    finally:
        for block in blocks:
            del block.forward


def hidden_of(block_output: Any) -> Tensor:
    """The hidden states among what a block returned."""
    return block_output[0] if isinstance(block_output, tuple | list) else block_output


def form_of_output(output: Any, hidden: Tensor, block: str, model: str) -> Form:
    """The form of what a block has returned.

    Args:
        output: what it has returned.
        hidden: its input.
        block: its name, for the message.
        model: name of the model's class, for the message.

    Raises:
        InputError: the hidden states are not the first of what it returns.
    """
    leaves = leaves_of(output)
    if not leaves or leaves[0] is not hidden_of(output):
        raise InputError(
            f"{block}: {UNSUPPORTED} {model}: the block returns a {type(output).__name__} that does not begin with "
            "the hidden states"
        )
    # The hidden states are given anew each time.
    others = iter([hidden.to("meta"), *leaves[1:]])
    return Form(rebuilt(output, lambda _: next(others)), hidden.shape)
