"""Logits, loss and perplexity after the last block, through the model's own final norm, head and caps."""

import math

import torch
from torch import Tensor, nn

from sparsefw.model.forward import run_behind_blocks
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
        for j, windows in enumerate(states.windows):
            hidden, others = states.hidden[j], states.behind_last(j)
            batch = ids[count : count + windows]
            if states.flow.by_window and hidden.shape[:2] == batch.shape:
                # One window at a time: logits over a large vocabulary are the largest tensor of a run.
                total += sum(loss(model, batch[n : n + 1], hidden[n : n + 1]) for n in range(windows))
            else:
                total += windows * loss(model, batch, hidden, others)
            count += windows
    return math.exp(total / count)


@torch.no_grad()
def loss(model: StreamedModel, ids: Tensor, hidden: Tensor, others: dict[int, Tensor] | None = None) -> float:
    """Mean negative log-likelihood per predicted token.

    Args:
        model: the model.
        ids: (batch, seqlen) tokens; all but the first of each window are predicted.
        hidden, others: as for `logits`.
    """
    predictions = logits(model, ids, hidden, others)[:, :-1].float()
    targets = ids[:, 1:].to(model.device)
    return nn.functional.cross_entropy(predictions.flatten(0, 1), targets.flatten()).item()


@torch.no_grad()
def logits(model: StreamedModel, ids: Tensor, hidden: Tensor, others: dict[int, Tensor] | None = None) -> Tensor:
    """Logits (batch, seqlen, vocabulary); inside `StreamedModel.outside` weights are not read anew.

    Args:
        model: the model, for which `embed` has run.
        ids: (batch, seqlen) tokens.
        hidden: (batch, seqlen, d) in most models, the last block's output.
        others: tensors of earlier blocks that are read behind the last one, see `HiddenStates.behind_last`.
    """
    with model.outside():
        return run_behind_blocks(model, ids, hidden.to(model.device), others or {}).logits
