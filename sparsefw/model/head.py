"""Logits, loss and perplexity after the last block, through the model's own final norm, head and caps."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.data import Batch, Batches, Windows, token_batch
from sparsefw.errors import InputError
from sparsefw.model.block_model import BlockModel
from sparsefw.model.forward import form_of, run_behind_blocks, run_with_blocks_replaced
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.ranks import ALONE, Ranks

# math.exp overflows beyond it.
LARGEST_EXPONENT = math.log(sys.float_info.max)


@torch.no_grad()
def perplexity(states: HiddenStates, samples: Windows | Batches, ranks: Ranks = ALONE) -> float:
    """exp of the mean negative log-likelihood over all windows, or of the losses that the model itself returns.

    Args:
        states: the windows or batches after the last block.
        samples: these windows; or these batches, with what the model makes a loss of. All count alike.
        ranks: each has some of them.

    Raises:
        InputError: the model returns no loss for a batch.
    """
    total, count, model = 0.0, 0, states.model
    with model.outside():
        for j, windows in enumerate(states.windows):
            hidden, others = states.hidden[j], states.behind_last(j)
            if isinstance(samples, Batches):
                total += _loss_in(run_behind_blocks(model, samples.batches[j], hidden, others), model, j).item()
            elif states.flow.by_window and hidden.shape[:2] == (windows, samples.seqlen):
                # One window at a time: logits over a large vocabulary are the largest tensor of a run.
                ids = samples.ids[count : count + windows]
                total += sum(loss(model, ids[n : n + 1], hidden[n : n + 1]) for n in range(windows))
            else:
                total += windows * loss(model, samples.ids[count : count + windows], hidden, others)
            count += windows
    sums = ranks.gather((total, count))
    return exp(sum(total for total, _ in sums) / sum(count for _, count in sums))


def exp(x: float) -> float:
    """exp(x); infinity where it is beyond the largest float."""
    return math.inf if x > LARGEST_EXPONENT else math.exp(x)


@torch.no_grad()
def check_losses(model: BlockModel, batches: Iterable[Batch]) -> None:
    """Refuse batches for `perplexity_of_batches` before a run: at its end, all that it has made would be of no use.

    The model's own forward runs with stand-ins for what blocks return.

    Raises:
        InputError: the model returns no loss for a batch.
    """

    def stand_in(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return form_of(model, i, args[0], args[1:], kwargs).after(args[0])

    with model.outside():
        for j, batch in enumerate(batches):
            _loss_in(run_with_blocks_replaced(model, batch.to(model.device), stand_in), model, j)


def _loss_in(returned: Any, model: BlockModel, j: int) -> Tensor:
    """The loss in what a model returned for batch j."""
    value = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(
            f"evaluate[{j}]: {type(model.model).__name__} returns no loss for this batch; add what it makes one of, "
            "such as labels"
        )
    return value


@torch.no_grad()
def loss(model: BlockModel, ids: Tensor, hidden: Tensor, others: dict[int, Tensor] | None = None) -> float:
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
def logits(model: BlockModel, ids: Tensor, hidden: Tensor, others: dict[int, Tensor] | None = None) -> Tensor:
    """Logits (batch, seqlen, vocabulary); inside `BlockModel.outside` weights are not read anew.

    Args:
        model: the model, for which `embed` has run.
        ids: (batch, seqlen) tokens.
        hidden: (batch, seqlen, d) in most models, the last block's output.
        others: tensors of earlier blocks that are read behind the last one, see `HiddenStates.behind_last`.
    """
    with model.outside():
        return run_behind_blocks(model, token_batch(ids), hidden.to(model.device), others or {}).logits


def same_logits(logits: Tensor, others: Tensor) -> bool:
    """Whether logits are the same but for their rounding, which products of other shapes have.

    A model may give no chance to a token, and a damaged one NaN.
    """
    finite = logits[logits.isfinite()]
    within = 0.01 * float(finite.abs().max()) if len(finite) else 0.0
    return logits.shape == others.shape and torch.allclose(logits, others, rtol=0.01, atol=within, equal_nan=True)
