"""Logits, losses and perplexity from the last block's output, by the model's own final norm, head and soft-capping.

A pruned model's predictions are compared with those of the dense model:

    divergence = sum over tokens and vocabulary of p (log p - log q)        p: dense, q: pruned (Kullback and Leibler)

Its gradient with respect to q's logits is q - p. Memory holds fp32 distributions for one piece of the logits.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from sparsefw.data.batches import Batch, Batches, token_batch
from sparsefw.data.windows import Samples
from sparsefw.errors import InputError
from sparsefw.model.block_model import BlockModel
from sparsefw.model.forward import logits_after_blocks, run_after_blocks
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.tape import Calls
from sparsefw.model.trace import Values
from sparsefw.ranks import ALONE, Ranks

# Number of logits in a piece, by type of device; a piece has at least one token. On a CPU a piece fits into the cache.
PIECE = {"cpu": 2**18, "cuda": 2**24}

# torch's loss functions. A model's forward calls them in fp32, see `_in_fp32`.
LOSSES = {F.cross_entropy, F.nll_loss, F.log_softmax, F.kl_div, F.mse_loss, F.l1_loss, F.smooth_l1_loss}
LOSSES |= {F.binary_cross_entropy, F.binary_cross_entropy_with_logits}


def perplexity(states: HiddenStates, samples: Samples, ranks: Ranks = ALONE) -> float:
    """exp of the mean loss (`window_losses`) over the windows of all ranks. Each rank has a part of the samples.

    Raises:
        InputError: the model returns no loss for a batch.
    """
    losses = window_losses(states, samples)
    sums = ranks.gather((sum(map(sum, losses)), sum(map(len, losses))))
    return exp(sum(total for total, _ in sums) / sum(count for _, count in sums))


@torch.no_grad()
def window_losses(states: HiddenStates, samples: Samples) -> list[list[float]]:
    """The losses of the windows, in a list for each micro-batch.

    The loss of a window is the mean negative log-likelihood of its predicted tokens. A caller's batch has one loss,
    which the model itself returns.

    Args:
        states: hidden states of the samples after the last block.
        samples: the windows of tokens, or a caller's batches.

    Raises:
        InputError: the model returns no loss for a batch.
    """
    losses, model, first = list[list[float]](), states.model, 0
    with model.outside_loaded():
        for j, windows in enumerate(states.windows):
            hidden, others = states.hidden[j], states.after_last(j)
            if isinstance(samples, Batches):
                losses.append([_own_loss(model, samples.batches[j], j, hidden, others).item()])
                continue
            ids = samples.ids[first : first + windows]
            first += windows
            if model.flow.by_window and hidden.shape[:2] == ids.shape:
                # One window at a time, since logits over a large vocabulary are the largest tensor of a run.
                losses.append(
                    [loss for n in range(windows) for loss in _losses(model, ids[n : n + 1], hidden[n : n + 1])]
                )
            else:
                losses.append(_losses(model, ids, hidden, others))
    return losses


def _losses(model: BlockModel, ids: Tensor, hidden: Tensor, others: Values | None = None) -> list[float]:
    """Each window's mean negative log-likelihood of all its tokens but the first; arguments as for `logits`."""
    predictions = logits(model, ids, hidden, others)
    targets = ids[:, 1:].to(model.device)
    return [F.cross_entropy(x[:-1].float(), y).item() for x, y in zip(predictions, targets, strict=True)]


def _in_fp32(func: Any, args: tuple, kwargs: dict) -> Any:
    """Call a torch function; a loss function gets its tensors in fp32 at least.

    In bf16 a loss near 5 has an error of up to 0.03, and the perplexity one of 3 %.
    """

    def raised(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x

    if func in LOSSES:
        args, kwargs = tree_map_only(Tensor, raised, (args, kwargs))
    return func(*args, **kwargs)


def exp(x: float) -> float:
    """exp(x); infinity if exp(x) is larger than the largest float."""
    # math.exp would raise an error.
    return torch.tensor(x, dtype=torch.float64).exp().item()


@torch.no_grad()
def check_losses(model: BlockModel, batches: Iterable[Batch]) -> None:
    """Refuse batches for which the model returns no loss, or NaN, before a run that would end without a perplexity.

    The model's own forward runs with stubs in place of the blocks.

    Raises:
        InputError: the model returns no loss for a batch, or NaN, as torch's losses do without labels.
    """
    with model.outside_loaded():
        for j, batch in enumerate(batches):
            if _own_loss(model, batch, j, None, {}).isnan():
                raise InputError(f"evaluate[{j}]: the loss of this batch is NaN; give labels that are not all ignored")


def _own_loss(model: BlockModel, batch: Batch, j: int, hidden: Tensor | None, others: Values) -> Tensor:
    """The loss that the model returns for batch j of the evaluation; other arguments as for `run_after_blocks`."""
    with Calls(_in_fp32):
        returned = run_after_blocks(model, batch, hidden, others)
    value = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(
            f"evaluate[{j}]: {model.class_name} returns no loss for this batch; add the arguments that its "
            "loss needs, such as labels"
        )
    return value


def logits(model: BlockModel, ids: Tensor, hidden: Tensor, others: Values | None = None) -> Any:
    """Logits (batch, seqlen, vocabulary); None if the model returns no logits.

    Loads the weights outside of the blocks, unless the caller has entered `BlockModel.outside_loaded`.

    Args:
        model: the model, for which `embed` has run.
        ids: (batch, seqlen) tokens.
        hidden: the last block's output, (batch, seqlen, d) in most models.
        others: other tensors of blocks that the forward reads after the last block, see `HiddenStates.after_last`.
    """
    return logits_of_batch(model, token_batch(ids), hidden, others)


def logits_of_batch(model: BlockModel, batch: Batch, hidden: Tensor, others: Values | None) -> Any:
    """Logits of a batch, as `logits`."""
    with model.outside_loaded():
        if model.flow.by_window:
            return logits_after_blocks(model, batch, hidden)
        return getattr(run_after_blocks(model, batch, hidden, others or {}), "logits", None)


def add_divergence(total: Tensor, p_logits: Tensor, q_logits: Tensor, replace: bool) -> None:
    """Add the divergence of logits (windows, tokens, vocabulary) to `total`, () fp32.

    With `replace`, the gradient of the divergence with respect to q_logits overwrites p_logits.
    """
    tokens = max(1, PIECE[total.device.type] // p_logits.shape[-1])
    for p, q in zip(p_logits.split(tokens, 1), q_logits.split(tokens, 1), strict=True):
        total += _compare_piece(p, q, replace)


def _compare_piece(p_logits: Tensor, q_logits: Tensor, replace: bool) -> Tensor:
    """The divergence of a piece of the logits, () fp32. `replace` is as for `add_divergence`."""
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    p = log_p.exp()
    # A token with p = 0 (logit -inf) adds nothing; the formula would give NaN.
    divergence = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0).sum()
    if replace:
        p_logits.copy_(log_q.exp_().sub_(p))
    return divergence
