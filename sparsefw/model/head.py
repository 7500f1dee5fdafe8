"""Logits, loss and perplexity after the last block, through the model's own final norm, head and caps."""

import math

import torch
from torch import Tensor, nn

from sparsefw.model.forward import as_block_output, run_with_blocks_replaced
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.streamed import StreamedModel


def perplexity(states: HiddenStates, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood over all windows.

    Args:
        states: the windows after the last block.
        ids: (windows, seqlen) their tokens.
    """
    total, count, model = 0.0, 0, states.model
    with model.outside():
        for hidden in states.hidden:
            batch = ids[count : count + len(hidden)]
            # One window at a time: logits over a large vocabulary are the largest tensor of a run.
            total += sum(loss(model, batch[n : n + 1], hidden[n : n + 1]) for n in range(len(hidden)))
            count += len(hidden)
    return math.exp(total / count)


@torch.no_grad()
def loss(model: StreamedModel, ids: Tensor, hidden: Tensor) -> float:
    """Mean negative log-likelihood per predicted token.

    Args:
        model: the model.
        ids: (batch, seqlen) tokens; all but the first of each window are predicted.
        hidden: (batch, seqlen, d), the last block's output.
    """
    predictions = logits(model, ids, hidden)[:, :-1].float()
    targets = ids[:, 1:].to(model.device)
    return nn.functional.cross_entropy(predictions.flatten(0, 1), targets.flatten()).item()


@torch.no_grad()
def logits(model: StreamedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """Logits (batch, seqlen, vocabulary); inside `StreamedModel.outside` weights are not read anew.

    Args:
        model: the model.
        ids: (batch, seqlen) tokens.
        hidden: (batch, seqlen, d), the last block's output.
    """
    last = len(model.blocks) - 1
    hidden = hidden.to(model.device)
    with model.outside():
        return run_with_blocks_replaced(
            model, ids, lambda i, before, args, kwargs: as_block_output(model, hidden if i == last else before)
        ).logits
