"""Prune the layers that share an input, and report their errors.

Rows of one dtype are stacked. Where they are independent they are solved in chunks that fit a memory limit, on a CPU
several at once, and neither stacks nor chunks change the result.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefw.caller import without_autocast
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.topk_torch import masked
from sparsefw.ranks import ALONE, Ranks, shares
from sparsefw.solver import patterns
from sparsefw.solver.config import METHODS, PruneConfig
from sparsefw.solver.methods import CHOOSE, Choice
from sparsefw.solver.refit import Cross
from sparsefw.solver.stack import ROW_UNIT, Member, Stack, by_chunks, stack_rows


@dataclass(frozen=True)
class LayerResult:
    """One row of the log and of the report.

    Attributes:
        name: the weight's name in the checkpoint's model.
        shape: (out, in).
        pattern: sparsity pattern, as the user wrote it.
        kept: weights that the mask keeps; fewer than the pattern allows only where zeros stay zero (`keep_zeros`).
        method: how the mask was chosen.
        warm_start: saliency of the warm start.
        alpha: fraction of kept entries fixed by saliency; None where nothing is fixed.
        steps: Frank-Wolfe steps of the first solve.
        target: "dense" or "layer", see `PruneConfig`. Below, T is the target weight under "dense", and the layer's own
            weight W under "layer".
        error_warm_start: ||T X - (M * W) X||_F^2 of the warm start's mask, over all calibration tokens; with a refit,
            which starts from T, ||T X - (M * T) X||_F^2.
        error_mask: the same of the best mask found before any refit.
        error: ||T X - Z X||_F^2 of the weights written.
        relative_mask, relative_error: error_mask and error / error_warm_start; 1 where both are 0, and inf where only
            error_warm_start is 0.
        gap: error_mask minus the largest lower bound; no mask of unchanged weights that keeps as many in each row, and
            the fixed entries, is better by more. None where no step was taken.
        seconds: time of choosing mask and weights, without the calibration; a stack's time is split by rows.
        transposed: whether the checkpoint's model stores the weight as (in, out).
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    kept: int
    method: str
    warm_start: str
    alpha: float | None
    steps: int
    target: str
    error_warm_start: float
    error_mask: float
    error: float
    relative_mask: float
    relative_error: float
    gap: float | None
    seconds: float
    transposed: bool = False


@torch.no_grad()
@without_autocast()
def solve_layer(
    W: Tensor, G: Tensor, config: PruneConfig | None = None, *, name: str = "layer", B: Tensor | None = None
) -> tuple[Tensor, Tensor, LayerResult]:
    """Prune one layer, for callers with a loop of their own.

    Products of fp32 are as exact as `torch.set_float32_matmul_precision` says.

    Args:
        W: (rows, d) weight, fp32 / bf16 / fp16; left as it is.
        G: (d, d) fp32 Gram matrix (Hessian) X X^T of its inputs X (d, tokens).
        config: how to prune; None is the default. Its fields about a whole model (compare, target,
            include, ignore) play no part, and no reconstruction follows. Where it names no kernel and no precision,
            they are those of the device of W.
        name: the layer's name, for messages.
        B: (rows, d) fp32 cross matrix D X^T, where D (rows, tokens) is the wanted output minus W X. With it the layer's
            target is pruned in place of W, see `refit`.

    Returns:
        mask (rows, d) bool, True keeps a weight; the pruned weight (rows, d) in the dtype of W; and its errors.

    Raises:
        TypeError: no tensor or one of another dtype, or a config that is no PruneConfig.
        ValueError: shapes do not go together.
        InputError: d does not divide into the pattern's groups.
        FloatingPointError: W, G or B hold NaN or Inf, or numbers too large for the errors.
    """
    _check_matrix("W", W, None, torch.float32, torch.bfloat16, torch.float16)
    _check_matrix("G", G, (W.shape[1], W.shape[1]), torch.float32)
    if B is not None:
        _check_matrix("B", B, W.shape, torch.float32)
    if config is not None and not isinstance(config, PruneConfig):
        raise TypeError(f"config: expected a PruneConfig, got {type(config).__name__}")
    # No reconstruction makes up for fewer steps here.
    config = (config or PruneConfig()).replace(reconstruct=0).on(W.device)
    pruned = W.detach().clone()
    masks: list[Tensor] = []
    # Threads that solve chunks of rows would record gradients.
    G, cross = G.detach(), None if B is None else Cross("outputs", B.detach())
    (result,) = prune_layers([(name, pruned)], G, config.method, config, config.backend, crosses=[cross], masks=masks)
    return torch.cat(masks)[: len(W)], pruned, result


def _check_matrix(name: str, x: Any, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> None:
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a tensor in {', '.join(map(str, dtypes))}, got {got}")
    if x.ndim != 2 or not x.numel() or shape not in (None, x.shape):
        raise ValueError(f"{name}: expected a matrix of shape {shape or '(rows, d)'}, not empty, got {tuple(x.shape)}")


def prune_layers(
    layers: list[tuple[str, Tensor]],
    G: Tensor,
    method: str,
    config: PruneConfig,
    backend: Backend,
    *,
    memory: int = 4 << 30,
    crosses: list[Cross | None] | None = None,
    masks: list[Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> list[LayerResult]:
    """Choose masks and weights of layers that read the same input, and write them in place; a result for each layer.

    Args:
        layers: (name, weight) with weight a (out, in) view into the block, fp32 / bf16 / fp16, any strides. Several are
            of one dtype, and stacked: only where `PruneConfig.rows_independent`.
        G: (in, in) fp32 Gram matrix of their input.
        method: one of METHODS.
        config: the config of the run.
        backend: the operations.
        memory: bytes that the state of one solve may take; longer stacks are solved in chunks of rows.
        crosses: what was measured of each layer's difference to the dense model, or None. With it, the layer's target
            is pruned in place of its weight, see `refit`.
        masks: a list to which the masks of the stacked rows, (rows, in) bool, and of those that pad a stack are
            appended chunk by chunk.
        ranks: each solves its share of the rows, if `PruneConfig.rows_shared`, and has all of them in the end. Of a
            cross matrix with rows a rank needs those of its share.

    Raises:
        InputError: the rows do not divide into the pattern's groups, or the memory is too little for any chunk.
        ValueError: there is a cross matrix, and the method approximates only the layer itself.
        FloatingPointError: an error is not finite, or G is not positive definite for a method that needs it; the
            message names the layer.
    """
    if any(cross is not None for cross in crosses or []) and not METHODS[method].uses_target:
        raise ValueError(f"crosses: {method} approximates what the layers themselves put out")
    for name, weight in layers:
        patterns.check_width(config.pattern, weight.shape[1], name)
    members = [
        Member(name, weight, cross, "layer" if cross is None else "dense")
        for (name, weight), cross in zip(layers, crosses or [None] * len(layers), strict=True)
    ]
    # Cross matrices may be as large as the weights: only the members may keep them.
    del crosses
    stack = Stack(members, G, method, config, backend, memory if config.rows_independent(method) else None)
    started = time.perf_counter()
    try:
        sums = _choose_rows(stack, ranks.share(stack.height, ROW_UNIT), masks)
    except FloatingPointError as error:
        raise FloatingPointError(f"{', '.join(name for name, _ in layers)}: {error}") from error
    if not ranks.alone:
        sums = _exchange(stack, sums, ranks)
    seconds = (time.perf_counter() - started) / sum(stack.lengths)
    return [_result(stack, *row, seconds) for row in zip(stack.members, sums.tolist(), strict=True)]


def _result(stack: Stack, member: Member, sums: list[float], seconds: float) -> LayerResult:
    """The result of a layer, whose sums are those of `_choose_rows`; `seconds` are those of a row."""
    method, config = stack.method, stack.config
    warm, mask, error, bound, kept = sums
    return LayerResult(
        name=member.name,
        shape=(member.weight.shape[0], member.weight.shape[1]),
        pattern=config.pattern.text,
        kept=int(kept),
        method=method,
        warm_start=METHODS[method].saliency or config.warm_start,
        alpha=config.alpha if method == "sparsefw" else None,
        steps=config.steps if method == "sparsefw" else 0,
        target=member.target,
        error_warm_start=warm,
        error_mask=mask,
        error=error,
        relative_mask=_relative(mask, warm),
        relative_error=_relative(error, warm),
        gap=None if math.isnan(bound) else mask - bound,
        seconds=seconds * len(member.weight),
    )


def _relative(error: float, warm: float) -> float:
    if warm:
        return error / warm
    # Rounding can leave the error of an exact fit just below 0.
    return math.inf if error > 0 else 1.0


def _choose_rows(stack: Stack, share: slice, masks: list[Tensor] | None) -> Tensor:
    """Choose masks and weights of some rows of a stack, and write them in place.

    Returns:
        (layers, 5) fp64 on the host: sums over the rows of each layer. They are the errors of the warm start, of the
        mask and of the weights, the bound, which is NaN if it is not known, and the number of kept weights.
    """
    problem, start = stack_rows(stack, share), share.start
    measured = [torch.zeros(5, 0, dtype=torch.float64, device=stack.G.device)]

    def choose(chunk: slice) -> Choice:
        return CHOOSE[stack.method](problem[chunk], stack.config, stack.backend)

    for choice in by_chunks(choose, problem.W, stack.memory, stack.members[0].name, stack.backend):
        part = slice(start, start + len(choice.mask))
        start = part.stop
        _write(stack.weights(part), choice)
        if masks is not None:
            masks.append(choice.mask)
        bound = torch.full_like(choice.error, math.nan) if choice.bound is None else choice.bound
        errors = choice.error_warm_start, choice.error_mask, choice.error, bound
        measured.append(torch.stack([x.double() for x in (*errors, choice.mask.sum(1))]))
    lengths = [len(weight) for weight in stack.weights(share)]
    # The padding below the last layer is cut off.
    by_layer = torch.cat(measured, 1)[:, : sum(lengths)].split(lengths, 1)
    return torch.stack([part.sum(1) for part in by_layer]).cpu()


def _write(weights: list[Tensor], choice: Choice) -> None:
    """Write the rows of a chunk into the rows of the layers that they belong to."""
    start = 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        start = rows.stop
        if choice.weight is None:
            weight.copy_(masked(weight, choice.mask[rows]))
        else:
            weight.copy_(choice.weight[rows])


def _exchange(stack: Stack, sums: Tensor, ranks: Ranks) -> Tensor:
    """Give all ranks the rows that each of them has chosen; returns the sums of all rows.

    Args:
        stack: its weights have this rank's rows.
        sums: of this rank's rows, see `_choose_rows`.
        ranks: the ranks.
    """
    for owner, share in enumerate(shares(stack.height, ranks.count, ROW_UNIT)):
        weights = stack.weights(share)
        lengths = [len(weight) for weight in weights]
        mine = owner == ranks.number
        rows = torch.cat(weights) if mine else weights[0].new_empty(sum(lengths), weights[0].shape[1])
        ranks.broadcast(owner, rows).wait()
        if not mine:
            for weight, chosen in zip(weights, rows.split(lengths), strict=True):
                weight.copy_(chosen)
    return torch.stack(ranks.gather(sums)).sum(0)
