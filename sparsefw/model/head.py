"""Logits, losses and perplexity from the last block's output, by the model's own final norm, head and soft-capping.

A pruned model's predictions are compared with those of the dense model:

    divergence = sum over tokens and vocabulary of p (log p - log q)        p: dense, q: pruned (Kullback and Leibler)

Its gradient with respect to q's logits is q - p. `divergence` backpropagates it to the hidden states window by window.
So memory holds the logits of one window only, and fp32 distributions for one piece of these logits.
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

# Number of tokens whose logits are compared in `logits_are_tokenwise`: the last ones.
COMPARED = 4

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


def tokens_of_pass(n: int, every: int) -> slice:
    """The tokens of a window that pass n compares: one in `every`. The next pass takes their right neighbours."""
    return slice(n % every, None, every)


@torch.no_grad()
def logits_are_tokenwise(states: HiddenStates, ids: Tensor, every: int) -> bool:
    """Whether a token's logits depend only on the hidden state of this token after the last block.

    Returns false, too, if a block would have to run to find out. Call this inside `BlockModel.outside_loaded`.

    Args:
        states: hidden states of windows before the first block.
        ids: (windows, seqlen) tokens of the windows.
        every: the test computes the logits of one token in `every`, and compares them with those of the whole window.
    """
    model, hidden = states.model, states.hidden[0]
    if not model.flow.by_window or hidden.shape[:2] != ids[: states.windows[0]].shape:
        return False
    some = tokens_of_pass(0, every)
    parts = hidden[:1], hidden[:1, some]
    if not all(model.templates.find(kind, x, any_shape=True) for kind in model.block_types for x in parts):
        # A stub is missing, and only a run of the block would show its output.
        return False
    whole = logits(model, ids[:1], hidden[:1])
    # A classifier returns logits for the whole window, not for each token.
    if not isinstance(whole, Tensor) or whole.ndim != 3 or whole.shape[:2] != ids[:1].shape:
        return False
    try:
        part = logits(model, ids[:1, some], hidden[:1, some])
    except InputError:
        # The model's forward needs all tokens.
        return False
    # A comparison of all tokens would take several times the memory of their logits.
    last, others = whole[:, some][:, -COMPARED:], part[:, -COMPARED:]
    # Logits may be -inf, and NaN in a damaged model. Products of different shapes round differently.
    finite = last[last.isfinite()]
    within = 0.01 * float(finite.abs().max()) if len(finite) else 0.0
    return last.shape == others.shape and torch.allclose(last, others, rtol=0.01, atol=within, equal_nan=True)


def divergence(model: BlockModel, ids: Tensor, hidden: Tensor, dense: Tensor) -> Tensor:
    """The Kullback-Leibler divergence, summed over all tokens, () fp32. It has a gradient with respect to `hidden`.

    Args:
        model: the model; call this inside `BlockModel.outside_loaded`.
        ids: (windows, seqlen) tokens.
        hidden, dense: (windows, seqlen, d) the last block's output in the pruned and in the dense model.
    """
    return _Divergence.apply(hidden, dense, ids, model)


class _Divergence(torch.autograd.Function):
    """Autograd function of `divergence`. Its forward computes the gradient, and its backward only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dense: Tensor, ids: Tensor, model: BlockModel) -> Tensor:
        total, needs_gradient = hidden.new_zeros((), dtype=torch.float32), ctx.needs_input_grad[0]
        gradients: list[Tensor] = []
        for n in range(len(ids)):
            window = slice(n, n + 1)
            x = hidden[window].detach().requires_grad_(needs_gradient)
            p_logits = logits(model, ids[window], dense[window])
            with torch.set_grad_enabled(needs_gradient):
                q_logits = logits(model, ids[window], x)
            add_divergence(total, p_logits, q_logits.detach(), needs_gradient)
            if needs_gradient:
                gradients += torch.autograd.grad(q_logits, x, p_logits)
            # Frees the logits before those of the next window are made.
            del p_logits, q_logits
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None, None


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
