"""Prune layers that read the same input, and measure their errors.

The layers are stacked. If rows are independent, the stack is solved in chunks that fit a memory limit; on a CPU several
chunks are solved at the same time. With torch in place of Triton, neither the stacking nor the chunks change a result.
"""

import math
import time
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from sparsefw.caller import without_autocast
from sparsefw.errors import InputError
from sparsefw.kernels.masks import masked
from sparsefw.solver import patterns
from sparsefw.solver.config import METHODS, PruneConfig
from sparsefw.solver.methods import CHOOSE, Choice
from sparsefw.solver.stack import Stack, in_chunks, places, stack_rows
from sparsefw.solver.targets import Cross


@dataclass(frozen=True)
class LayerResult:
    """Errors of a pruned layer: one row of the log and of the report.

    Attributes:
        name: name of the weight in the model.
        shape: (out, in).
        pattern: pattern of sparsity, as the user wrote it.
        kept: number of weights that the mask keeps. It is below the pattern's number only with `keep_zeros`.
        method: the method that chose the mask.
        warm_start: saliency of the warm start.
        alpha: fraction of kept entries that are fixed by saliency; None for a method without fixed entries.
        steps: Frank-Wolfe steps of the first solve.
        target: "dense" or "layer", see `PruneConfig`. In the errors below, T is the target with "dense", and the
            layer's own weight W with "layer".
        error_warm_start: ||T X - (M * W) X||_F^2 of the warm start's mask M, over all calibration tokens. With a refit
            T takes the place of W: ||T X - (M * T) X||_F^2.
        error_mask: the same error of the best mask found before any refit.
        error: ||T X - Z X||_F^2 of the weights that are written.
        relative_mask, relative_error: error_mask and error, divided by error_warm_start; 1 if both are 0, and inf if
            only error_warm_start is 0.
        gap: error_mask minus the largest lower bound: the most by which another mask with unchanged weights, the same
            budgets and the fixed entries could be better. None without Frank-Wolfe steps.
        seconds: seconds of choosing mask and weights, without the calibration. The seconds of a stack are divided among
            its layers by their rows.
        transposed: whether the checkpoint stores the weight as (in, out).
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
    """Prune one layer, for callers that loop over the layers of a model themselves.

    With kernel="torch", `torch.set_float32_matmul_precision` decides how exact products in fp32 are.

    Args:
        W: (rows, d) weight, fp32 / bf16 / fp16; it is not changed.
        G: (d, d) fp32 Gram matrix (Hessian) X X^T of the layer's inputs X (d, tokens).
        config: how to prune; None is the default, and `damp` is 0.1 unless it is set. Fields about a whole model
            (compare, target, include, ignore) are not used, and no reconstruction follows. A kernel or precision that
            is not set follows from the device of W.
        name: the layer's name, for messages and the result.
        B: (rows, d) fp32 cross matrix D X^T, where D (rows, tokens) is the wanted output minus W X. With it the layer's
            target is pruned in place of W, see `targets`.

    Returns:
        The mask (rows, d) bool, True keeps a weight; the pruned weight (rows, d) in the dtype of W; and the errors.

    Raises:
        InputError: an argument is no tensor of an allowed dtype and shape, the config is not a PruneConfig, d does not
            divide into the pattern's groups, or the method takes no B.
        FloatingPointError: W, G or B holds NaN or Inf, or values so large that the errors overflow.
    """
    _check_matrix("W", W, None, torch.float32, torch.bfloat16, torch.float16)
    _check_matrix("G", G, (W.shape[1], W.shape[1]), torch.float32)
    if B is not None:
        _check_matrix("B", B, W.shape, torch.float32)
    if config is not None and not isinstance(config, PruneConfig):
        raise InputError(f"config: expected a PruneConfig, got {type(config).__name__}")
    # Without `reconstruct=0` the defaults would make fewer steps, in the belief that a reconstruction follows.
    config = (config or PruneConfig()).replace(reconstruct=0).on(W.device)
    pruned = W.detach().clone()
    masks: list[Tensor] = []
    # `no_grad` holds for this thread only. Without `detach` the threads that solve chunks would record gradients.
    G, cross = G.detach(), None if B is None else Cross("outputs", B.detach())
    (result,) = prune_layers([(name, pruned)], G, config.method, config, crosses=[cross], masks=masks)
    return torch.cat(masks)[: len(W)], pruned, result


def _check_matrix(name: str, x: Any, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> None:
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name}: expected a tensor in {', '.join(map(str, dtypes))}, got {got}")
    if x.ndim != 2 or not x.numel() or shape not in (None, x.shape):
        raise InputError(f"{name}: expected a matrix of shape {shape or '(rows, d)'}, not empty, got {tuple(x.shape)}")


def prune_layers(
    layers: list[tuple[str, Tensor]],
    G: Tensor,
    method: str,
    config: PruneConfig,
    *,
    memory: int = 4 << 30,
    crosses: list[Cross | None] | None = None,
    masks: list[Tensor] | None = None,
) -> list[LayerResult]:
    """Choose masks and weights of layers that read the same input, and write the weights in place.

    Args:
        layers: (name, weight) of each layer. The weight is an (out, in) view into the block, fp32 / bf16 / fp16, with
            any strides. Several layers must have one dtype and a method with `PruneConfig.rows_independent`. With
            `PruneConfig.rows_shared`, a weight may be a slice of a layer's rows.
        G: (in, in) fp32 Gram matrix of the layers' input.
        method: one of METHODS.
        config: the config of the run.
        memory: limit in bytes for the state of a solve. A stack that needs more is solved in chunks of rows.
        crosses: cross matrix of each layer, or None. A layer with a cross matrix is pruned to approximate its target in
            place of its weight, see `targets`.
        masks: a list to which the masks of the stacked rows, (rows, in) bool, are appended chunk by chunk. Rows that
            pad a stack come last.

    Returns:
        A result for each layer.

    Raises:
        InputError: the rows do not divide into the pattern's groups, the memory is too small for the smallest chunk, or
            a layer has a cross matrix, but the method takes no targets (`Method.dense_target`).
        FloatingPointError: an error is not finite, or G is not positive definite for a method that needs it. The
            message names the layers.
    """
    crosses = crosses or [None] * len(layers)
    if any(crosses) and not METHODS[method].dense_target:
        raise InputError(f"B: {method} approximates the layer's own output; leave B out")
    for name, weight in layers:
        patterns.check_width(config.pattern, weight.shape[1], name)
    targets = ["dense" if cross else "layer" for cross in crosses]
    names = [name for name, _ in layers]
    weights = [weight for _, weight in layers]
    backend, chunk_memory = config.backend, memory if config.rows_independent(method) else None
    stack = Stack(names, weights, [*crosses], G, METHODS[method], config, backend, chunk_memory)
    # Cross matrices may be as large as the weights. So only the stack holds them, and it frees them early.
    del crosses
    started = time.perf_counter()
    measured = [torch.zeros(5, 0, dtype=torch.float64, device=G.device)]
    problem = stack_rows(stack)
    try:
        with in_chunks(stack) as (chunks, run):
            choices = run(CHOOSE[method], map(problem.__getitem__, chunks), repeat(config), repeat(backend))
            for chunk, choice in zip(chunks, choices, strict=True):
                _write(stack, chunk, choice)
                measured.append(_measures(choice))
                if masks is not None:
                    masks.append(choice.mask)
    except FloatingPointError as error:
        raise FloatingPointError(f"{', '.join(names)}: {error}") from error
    lengths = [len(weight) for weight in weights]
    # The rows after the last layer are padding.
    by_layer = torch.cat(measured, 1)[:, : sum(lengths)].split(lengths, 1)
    sums = torch.stack([part.sum(1) for part in by_layer]).cpu()
    seconds = (time.perf_counter() - started) / max(1, sum(lengths))
    return [
        _result(layer, target, row, len(layer[1]) * seconds, method, config)
        for layer, target, row in zip(layers, targets, sums.tolist(), strict=True)
    ]


def _write(stack: Stack, chunk: slice, choice: Choice) -> None:
    """Write the weights of a choice, made for a chunk of the stack, into the layers."""
    for weight, (rows, place) in zip(stack.weights, places(stack.weights, chunk), strict=True):
        if choice.weight is None:
            weight[rows] = masked(weight[rows], choice.mask[place])
        else:
            weight[rows] = choice.weight[place]


def _measures(choice: Choice) -> Tensor:
    """Collect five measures of each row, whose sums over a layer's rows make its result, (5, rows) fp64.

    The measures are error_warm_start, error_mask, error, the bound (NaN if there is none), and the number of kept
    weights.
    """
    bound = torch.full_like(choice.error, math.nan) if choice.bound is None else choice.bound
    measures = choice.error_warm_start, choice.error_mask, choice.error, bound, choice.mask.sum(1)
    return torch.stack([x.double() for x in measures])


def _result(
    layer: tuple[str, Tensor], target: str, sums: list[float], seconds: float, method: str, config: PruneConfig
) -> LayerResult:
    """Make the result of a layer from the sums of its rows' measures."""
    name, weight = layer
    warm, mask, error, bound, kept = sums
    takes_steps = METHODS[method].frank_wolfe
    return LayerResult(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        pattern=config.pattern.text,
        kept=int(kept),
        method=method,
        warm_start=config.warm_start,
        alpha=config.alpha if takes_steps else None,
        steps=config.steps if takes_steps else 0,
        target=target,
        error_warm_start=warm,
        error_mask=mask,
        error=error,
        relative_mask=relative(mask, warm),
        relative_error=relative(error, warm),
        gap=None if math.isnan(bound) else mask - bound,
        seconds=seconds,
    )


def relative(error: float, warm: float) -> float:
    """Divide an error by `warm`, the error of the warm start's mask. The result is 1 if both are 0."""
    if warm:
        return error / warm
    # Rounding may leave the error of an exact fit just below 0.
    return math.inf if error > 0 else 1.0
