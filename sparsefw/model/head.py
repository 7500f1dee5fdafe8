"""Logits, perplexity and predictions of a model, by its own final norm, head and caps after the last block.

A pruned model's predictions are compared with those of the dense model:

    divergence = sum over tokens and vocabulary of p (log p - log q)        p: dense, q: pruned (Kullback and Leibler)

Its gradient by q's logits is q - p. It goes back to the hidden states while the logits are there, so that only the
logits of one window are in memory, and the fp32 distributions of a piece of them.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from sparsefw.data.batches import Batch, Batches, token_batch
from sparsefw.data.windows import Windows
from sparsefw.errors import InputError
from sparsefw.model.block_model import BlockModel
from sparsefw.model.forward import logits_after_blocks, run_after_blocks
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.tape import Calls
from sparsefw.ranks import ALONE, Ranks

# Entries of the logits whose distributions are in memory at once, at least those of a token: few stay in a processor's
# cache, and their memory is used again.
PIECE = {"cpu": 2**18, "cuda": 2**24}

# The last tokens by which logits of a part of a window are compared with those of the whole.
COMPARED = 4

# Functions of which models make their losses.
LOSSES = {F.cross_entropy, F.nll_loss, F.log_softmax, F.kl_div, F.mse_loss, F.l1_loss, F.smooth_l1_loss}
LOSSES |= {F.binary_cross_entropy, F.binary_cross_entropy_with_logits}

# math.exp overflows beyond it.
LARGEST_EXPONENT = math.log(sys.float_info.max)


def perplexity(states: HiddenStates, samples: Windows | Batches, ranks: Ranks = ALONE) -> float:
    """exp of the mean of `window_losses` over all ranks, each of which has some of the samples.

    Raises:
        InputError: as `window_losses`.
    """
    losses = window_losses(states, samples)
    sums = ranks.gather((sum(map(sum, losses)), sum(map(len, losses))))
    return exp(sum(total for total, _ in sums) / sum(count for _, count in sums))


@torch.no_grad()
def window_losses(states: HiddenStates, samples: Windows | Batches) -> list[list[float]]:
    """By micro-batch, the mean negative log-likelihood per predicted token of each window.

    Args:
        states: the windows or batches after the last block.
        samples: these windows; or these batches, each of which has the loss that the model itself returns.

    Raises:
        InputError: the model returns no loss for a batch.
    """
    losses, model, first = list[list[float]](), states.model, 0
    with model.outside():
        for j, windows in enumerate(states.windows):
            hidden, others = states.hidden[j], states.after_last(j)
            if isinstance(samples, Batches):
                losses.append([_own_loss(model, samples.batches[j], j, hidden, others).item()])
                continue
            ids = samples.ids[first : first + windows]
            first += windows
            if model.flow.by_window and hidden.shape[:2] == ids.shape:
                # One window at a time: logits over a large vocabulary are the largest tensor of a run.
                losses.append(
                    [loss for n in range(windows) for loss in _losses(model, ids[n : n + 1], hidden[n : n + 1])]
                )
            else:
                losses.append(_losses(model, ids, hidden, others))
    return losses


def _losses(model: BlockModel, ids: Tensor, hidden: Tensor, others: dict[int, Tensor] | None = None) -> list[float]:
    """Mean negative log-likelihood of all tokens but the first of each window; arguments as for `logits`."""
    predictions = logits(model, ids, hidden, others)
    targets = ids[:, 1:].to(model.device)
    return [F.cross_entropy(x[:-1].float(), y).item() for x, y in zip(predictions, targets, strict=True)]


def _in_fp32(func: Any, args: tuple, kwargs: dict) -> Any:
    """Make a call; a loss in fp32 at least. In bf16 a loss near 5 is right to 0.03, and a perplexity to 3 %."""

    def exact(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x

    if func in LOSSES:
        args, kwargs = tree_map_only(Tensor, exact, (args, kwargs))
    return func(*args, **kwargs)


def exp(x: float) -> float:
    """exp(x); infinity where it is beyond the largest float."""
    return math.inf if x > LARGEST_EXPONENT else math.exp(x)


@torch.no_grad()
def check_losses(model: BlockModel, batches: Iterable[Batch]) -> None:
    """Refuse batches without a loss before a run, which would end without a perplexity.

    The model's own forward runs with stubs in place of the blocks.

    Raises:
        InputError: the model returns no loss for a batch.
    """
    with model.outside():
        for j, batch in enumerate(batches):
            _own_loss(model, batch, j, None, {})


def _own_loss(model: BlockModel, batch: Batch, j: int, hidden: Tensor | None, others: dict[int, Tensor]) -> Tensor:
    """The loss that a model returns for batch j; hidden, others: as for `logits`, None as for `run_after_blocks`."""
    with Calls(_in_fp32):
        returned = run_after_blocks(model, batch, hidden, others)
    value = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(
            f"evaluate[{j}]: {type(model.model).__name__} returns no loss for this batch; add what it makes one of, "
            "such as labels"
        )
    return value


def logits(model: BlockModel, ids: Tensor, hidden: Tensor, others: dict[int, Tensor] | None = None) -> Any:
    """Logits (batch, seqlen, vocabulary); None: the model returns none. Inside `outside` no weights are read anew.

    Args:
        model: the model, for which `embed` has run.
        ids: (batch, seqlen) tokens.
        hidden: (batch, seqlen, d) in most models, the last block's output.
        others: tensors of earlier blocks that are read after the last one, see `HiddenStates.after_last`.
    """
    with model.outside():
        if model.flow.by_window:
            return logits_after_blocks(model, token_batch(ids), hidden)
        return getattr(run_after_blocks(model, token_batch(ids), hidden, others or {}), "logits", None)


def tokens_of_pass(n: int, every: int) -> slice:
    """The tokens of a window that steps look at in pass n over the windows: others than in the pass before."""
    return slice(n % every, None, every)


@torch.no_grad()
def predicts(states: HiddenStates, ids: Tensor, every: int) -> bool:
    """Whether a token's hidden state after the last block tells by itself which token comes next.

    Args:
        states: windows of tokens before any block; inside `BlockModel.outside`.
        ids: (windows, seqlen) their tokens.
        every: a step looks at one token in this number.
    """
    model, hidden = states.model, states.hidden[0]
    if not model.flow.by_window or hidden.shape[:2] != ids[: states.windows[0]].shape:
        return False
    some = tokens_of_pass(0, every)
    if not all(
        model.forms.find(kind, x, any_shape=True) for kind in model.block_types for x in (hidden[:1], hidden[:1, some])
    ):
        # One of the blocks would have to be run.
        return False
    whole = logits(model, ids[:1], hidden[:1])
    # The logits of a classifier are of the whole window.
    if not isinstance(whole, Tensor) or whole.ndim != 3 or whole.shape[:2] != ids[:1].shape:
        return False
    try:
        part = logits(model, ids[:1, some], hidden[:1, some])
    except InputError:
        # The model's forward needs all tokens.
        return False
    # A comparison of all tokens would take several times the memory of their logits.
    last, others = whole[:, some][:, -COMPARED:], part[:, -COMPARED:]
    # Logits may be -inf, and NaN in a damaged model. Products of other shapes round differently.
    finite = last[last.isfinite()]
    within = 0.01 * float(finite.abs().max()) if len(finite) else 0.0
    return last.shape == others.shape and torch.allclose(last, others, rtol=0.01, atol=within, equal_nan=True)


def divergence(model: BlockModel, ids: Tensor, hidden: Tensor, dense: Tensor) -> Tensor:
    """The divergence, summed over all tokens, () fp32. It has a gradient by `hidden`.

    Args:
        model: the model, inside `BlockModel.outside`.
        ids: (windows, seqlen) tokens.
        hidden, dense: (windows, seqlen, d) the last block's output in the pruned and in the dense model.
    """
    total: Tensor = _Divergence.apply(hidden, dense, ids, model)
    return total


class _Divergence(torch.autograd.Function):
    """`divergence`, which makes its gradient in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dense: Tensor, ids: Tensor, model: BlockModel) -> Tensor:
        total, asked = hidden.new_zeros((), dtype=torch.float32), ctx.needs_input_grad[0]
        gradients: list[Tensor] = []
        for n in range(len(ids)):
            window = slice(n, n + 1)
            x = hidden[window].detach().requires_grad_(asked)
            p_logits = logits(model, ids[window], dense[window])
            with torch.set_grad_enabled(asked):
                q_logits = logits(model, ids[window], x)
            add_divergence(total, p_logits, q_logits.detach(), asked)
            if asked:
                gradients += torch.autograd.grad(q_logits, x, p_logits)
            # The logits of the next window take their memory.
            del p_logits, q_logits
        if asked:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None, None


def add_divergence(total: Tensor, p_logits: Tensor, q_logits: Tensor, replace: bool) -> None:
    """Add the divergence of logits (windows, tokens, vocabulary) to `total`, () fp32.

    With `replace`, its gradient by q_logits takes the place of p_logits.
    """
    tokens = max(1, PIECE[total.device.type] // p_logits.shape[-1])
    for p, q in zip(p_logits.split(tokens, 1), q_logits.split(tokens, 1), strict=True):
        total += _compare_piece(p, q, replace)


def _compare_piece(p_logits: Tensor, q_logits: Tensor, replace: bool) -> Tensor:
    """The divergence of a piece of the logits, () fp32. `replace` is as for `add_divergence`."""
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    p = log_p.exp()
    # A token that never comes has the logit -inf, and adds nothing.
    divergence = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0).sum()
    if replace:
        p_logits.copy_(log_q.exp_().sub_(p))
    return divergence
