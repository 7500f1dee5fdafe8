"""Prune the layers that share an input, and report their errors.

Their rows are stacked and solved in chunks that fit a memory limit, on a CPU several chunks at once. Rows are
independent, so neither stacks nor chunks change the result.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefw.kernels.backend import Backend
from sparsefw.kernels.topk_torch import masked
from sparsefw.ranks import ALONE, Ranks, shares
from sparsefw.solver import patterns
from sparsefw.solver.choices import CHOOSE, Choice
from sparsefw.solver.chunks import ROW_UNIT, by_chunks
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.methods import METHODS
from sparsefw.solver.stack import Member, rows_of, rows_within, stack_rows
from sparsefw.solver.target import Cross


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
        relative_mask, relative_error: error_mask and error / error_warm_start; 1 where both are 0.
        gap: error_mask minus the largest lower bound; no mask of unchanged weights that keeps the fixed entries is
            better by more. None where no step was taken.
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
def solve_layer(
    W: Tensor, G: Tensor, config: PruneConfig | None = None, *, name: str = "layer", B: Tensor | None = None
) -> tuple[Tensor, Tensor, LayerResult]:
    """Prune one layer, for callers with a loop of their own.

    Args:
        W: (rows, d) weight, fp32 / bf16 / fp16; left as it is.
        G: (d, d) fp32 Gram matrix X X^T of its inputs X (d, tokens).
        config: how to prune; None is the default. Its fields about a whole model (compare, target,
            include, ignore) play no part.
        name: the layer's name, for messages.
        B: (rows, d) fp32 cross matrix D X^T, where D (rows, tokens) is the wanted output minus W X. With it the layer's
            target is pruned in place of W, see `target`.

    Returns:
        mask (rows, d) bool, True keeps a weight; the pruned weight (rows, d) in the dtype of W; and its errors.

    Raises:
        TypeError: another dtype.
        ValueError: shapes do not go together.
        InputError: d does not divide into the pattern's groups.
        FloatingPointError: W or G hold NaN or Inf.
    """
    if W.ndim != 2 or not W.numel():
        raise ValueError(f"W: expected a matrix (rows, d) that is not empty, got shape {tuple(W.shape)}")
    if W.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"W: expected fp32, bf16 or fp16, got {W.dtype}")
    for argument, matrix, shape in (("G", G, (W.shape[1], W.shape[1])), ("B", B, W.shape)):
        if matrix is None:
            continue
        if matrix.shape != shape:
            raise ValueError(f"{argument}: expected shape {tuple(shape)}, got {tuple(matrix.shape)}")
        if matrix.dtype != torch.float32:
            raise TypeError(f"{argument}: expected fp32, got {matrix.dtype}")
    config = PruneConfig() if config is None else config
    pruned = W.detach().clone()
    masks: list[Tensor] = []
    cross = None if B is None else Cross("outputs", B)
    (result,) = prune_layers([(name, pruned)], G, config.method, config, config.backend, crosses=[cross], masks=masks)
    return masks[0], pruned, result


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
) -> Iterator[LayerResult]:
    """Choose masks and weights of layers that read the same input, write them in place, yield a result for each.

    Args:
        layers: (name, weight) with weight a (out, in) view into the block, fp32 / bf16 / fp16, any strides.
        G: (in, in) fp32 Gram matrix of their input.
        method: one of METHODS.
        config: the config of the run.
        backend: the operations.
        memory: bytes that the state of one solve may take; longer stacks are solved in chunks of rows.
        crosses: what was measured of each layer's difference to the dense model, or None. With it, the layer's target
            is pruned in place of its weight, see `target`.
        masks: a list to which the mask of every layer, (out, in) bool, is appended.
        ranks: each solves its share of the rows, if `PruneConfig.rows_shared`, and has all of them in the end. Of a
            cross matrix with rows it needs those of its share.

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
    independent = config.rows_independent(method)
    for stack in [members] if independent else [[member] for member in members]:
        try:
            results = _prune_stack(stack, G, method, config, backend, memory if independent else None, masks, ranks)
        except FloatingPointError as error:
            raise FloatingPointError(f"{', '.join(member.name for member in stack)}: {error}") from error
        yield from results


def _prune_stack(
    stack: list[Member],
    G: Tensor,
    method: str,
    config: PruneConfig,
    backend: Backend,
    memory: int | None,
    masks: list[Tensor] | None,
    ranks: Ranks,
) -> list[LayerResult]:
    started = time.perf_counter()
    weights = [member.weight for member in stack]
    total = rows_of(stack, padded=memory is not None)
    chosen: list[Tensor] = []
    measured, bounded = _choose_rows(
        stack, G, method, config, backend, memory, ranks.share(total, ROW_UNIT), None if masks is None else chosen
    )
    if not ranks.alone:
        measured, bounded = _exchange(weights, shares(total, ranks.count, ROW_UNIT), measured, bounded, ranks)
    lengths = [len(weight) for weight in weights]
    # The padding below the last layer is cut off.
    by_layer = [part[..., : sum(lengths)].split(lengths, dim=-1) for part in measured]
    if masks is not None:
        masks += torch.cat(chosen)[: sum(lengths)].split(lengths)
    seconds = (time.perf_counter() - started) / sum(lengths)
    results = []
    for member, layer_errors, layer_kept in zip(stack, *by_layer, strict=True):
        warm, mask, error, bound = layer_errors.sum(1).tolist()
        results.append(
            LayerResult(
                name=member.name,
                shape=(member.weight.shape[0], member.weight.shape[1]),
                pattern=config.pattern.text,
                kept=int(layer_kept.sum().item()),
                method=method,
                warm_start=METHODS[method].saliency or config.warm_start,
                alpha=config.alpha if method == "sparsefw" else None,
                steps=config.steps if method == "sparsefw" else 0,
                target=member.target,
                error_warm_start=warm,
                error_mask=mask,
                error=error,
                relative_mask=mask / warm if warm else 1.0,
                relative_error=error / warm if warm else 1.0,
                gap=mask - bound if bounded else None,
                seconds=seconds * len(member.weight),
                # Parameters are stored row by row, and the weight is a view of one.
                transposed=member.weight.stride(0) < member.weight.stride(1),
            )
        )
    return results


def _choose_rows(
    stack: list[Member],
    G: Tensor,
    method: str,
    config: PruneConfig,
    backend: Backend,
    memory: int | None,
    share: slice,
    masks: list[Tensor] | None,
) -> tuple[list[Tensor], bool]:
    """Choose masks and weights of some rows of a stack, and write them in place.

    Returns:
        (4, rows) fp64, errors and bounds of the rows, and (rows,) the numbers of kept weights; nothing without rows.
        Whether bounds are known.
    """
    rows = stack_rows(stack, G, method, config, backend, memory, share)
    weights = [member.weight for member in stack]
    errors, kept, bounded, start = [], [], False, share.start

    def choose(chunk: slice) -> Choice:
        return CHOOSE[method](rows[chunk], config, backend)

    for choice in by_chunks(choose, rows.W, memory, stack[0].name, backend):
        _write(weights, start, choice)
        start += len(choice.mask)
        kept.append(choice.mask.sum(1))
        if masks is not None:
            masks.append(choice.mask)
        bounded = choice.bound is not None
        bound = torch.zeros_like(choice.error) if choice.bound is None else choice.bound
        errors.append(torch.stack([choice.error_warm_start, choice.error_mask, choice.error, bound]).double())
    return [torch.cat(errors, 1), torch.cat(kept)] if errors else [], bounded


def _write(weights: list[Tensor], start: int, choice: Choice) -> None:
    """Write the rows of a chunk, which begin at row `start` of the stack, into the layers they belong to."""
    end = 0
    for weight, rows in zip(weights, _rows_within(weights, slice(start, start + len(choice.mask))), strict=True):
        chosen = slice(end, end + rows.stop - rows.start)
        end = chosen.stop
        if choice.weight is None:
            weight[rows] = masked(weight[rows], choice.mask[chosen])
        else:
            weight[rows] = choice.weight[chosen]


def _rows_within(weights: list[Tensor], part: slice) -> list[slice]:
    return rows_within([len(weight) for weight in weights], part)


def _exchange(
    weights: list[Tensor], parts: list[slice], measured: list[Tensor], bounded: bool, ranks: Ranks
) -> tuple[list[Tensor], bool]:
    """Have all ranks' rows on each of them.

    Args:
        weights: of the layers of a stack. The rows of other ranks are overwritten.
        parts: the rows of the stack that each rank has solved.
        measured: what this rank knows of its rows, (..., rows); none if it has no rows.
        bounded: whether it knows bounds of the errors.
        ranks: the ranks.

    Returns:
        measured and bounded of all rows.
    """
    device = weights[0].device
    for owner, part in enumerate(parts):
        places = [weight[rows] for weight, rows in zip(weights, _rows_within(weights, part), strict=True)]
        lengths = [len(place) for place in places]
        mine = owner == ranks.number
        rows = torch.cat(places) if mine else places[0].new_empty(sum(lengths), places[0].shape[1])
        ranks.spread(owner, rows).wait()
        if not mine:
            for place, chosen in zip(places, rows.split(lengths), strict=True):
                place.copy_(chosen)
    gathered = [other for other in ranks.gather(([x.cpu() for x in measured], bounded)) if other[0]]
    columns = zip(*(parts for parts, _ in gathered), strict=True)
    return [torch.cat(column, -1).to(device) for column in columns], any(known for _, known in gathered)
