"""Prune the layers that share an input, and say what came of it.

Their rows are stacked and solved as one problem, in chunks that fit a memory budget, on a CPU several at once: rows are
independent, so none of it changes the result.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.kernels import cpu
from sparsefw.kernels.topk_torch import keep
from sparsefw.solver import patterns
from sparsefw.solver.methods import METHODS, Choice, Rows, Settings
from sparsefw.solver.objective import damped
from sparsefw.solver.saliency import SALIENCIES
from sparsefw.solver.target import target

# Conjugate-gradient steps from a layer's weight to its target.
TARGET_STEPS = 4

# Stacks and chunks are multiples of this many rows. A matrix product treats the last few rows apart, with other
# roundings: with none left over, a row's result does not depend on the rows beside it.
ROW_UNIT = 64

# Longest chunk on a CPU: longer ones fall out of its caches, and of short rows shorter ones are too little work between
# two calls from Python, for which threads wait for each other.
CPU_ROWS, CPU_ENTRIES = 384, 1 << 19

# Memory of a solve per entry of a chunk at its peak, as measured on a CPU (88 with the stack's W and saliency): fp32 W,
# T, what W lacks of it, M, R, U, E, the fit's Z and R, temporaries of the row step, and bool masks.
BYTES_PER_ENTRY = 80


Result = TypeVar("Result")


@dataclass(frozen=True)
class LayerResult:
    """One row of the log and of the report.

    Attributes:
        name: the weight's name in the checkpoint's model.
        shape: (out, in).
        pattern: sparsity pattern, as the user wrote it.
        kept: weights that the mask keeps.
        method: how the mask was chosen.
        warm_start: saliency of the warm start.
        alpha: fraction of kept entries fixed by saliency; None where nothing is fixed.
        steps: Frank-Wolfe steps of the first solve.
        target: "dense" or "layer", see `Settings`. Below, T is the target where that is the dense model's output, else
            the layer's own weight W.
        error_warm_start: ||T X - (M * W) X||_F^2 of the warm start's mask, over all calibration tokens; with a refit,
            which starts from T, ||T X - (M * T) X||_F^2.
        error_mask: the same of the best mask found before any refit.
        error: ||T X - Z X||_F^2 of the weights written.
        relative_mask, relative_error: error_mask and error / error_warm_start; 1 where both are 0.
        gap: error_mask minus the largest lower bound; no mask of unchanged weights that keeps the fixed entries is
            better by more. None where no step was taken.
        seconds: for choosing mask and weights, without the calibration forward; of a stack, by its share of the rows.
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


@dataclass
class _Part:
    """A layer in a stack, and what `prune_layers` was told of it; `cross` goes once the target is known."""

    name: str
    weight: Tensor
    cross: Tensor | None
    target: str


def prune_layers(
    layers: list[tuple[str, Tensor]],
    G: Tensor,
    method: str,
    settings: Settings,
    ops: ModuleType,
    *,
    crosses: list[Tensor | None] | None = None,
) -> Iterator[LayerResult]:
    """Choose masks and weights of layers that read the same input, write them in place, yield a row for each.

    Args:
        layers: (name, weight) with weight a (out, in) view into the block, fp32 / bf16 / fp16, any strides.
        G: (in, in) fp32 Gram matrix of their input.
        method: one of METHODS.
        settings: the run's settings.
        ops: the kernels, `sparsefw.kernels.cpu` or `sparsefw.kernels.triton_ops`.
        crosses: (out, in) fp32 cross matrix of each layer: its target is pruned in place of its weight, see `target`.
            Used up.

    Raises:
        InputError: the rows do not divide into the pattern's groups, or the memory is too little for any chunk.
        FloatingPointError: an error is not finite, or G is not positive definite for a method that needs it; the
            message names the layer.
    """
    for name, weight in layers:
        patterns.check_width(settings.pattern, weight.shape[1], name)
    stack = [
        _Part(name, weight, cross, "layer" if cross is None else "dense")
        for (name, weight), cross in zip(layers, crosses or [None] * len(layers), strict=True)
    ]
    # Cross matrices are as large as the weights: only the stack may keep them.
    del crosses
    together = METHODS[method].by_rows and not settings.whole
    for part in [stack] if together else [[layer] for layer in stack]:
        try:
            yield from _prune_stack(part, G, method, settings, ops, together)
        except FloatingPointError as error:
            raise FloatingPointError(f"{', '.join(one.name for one in part)}: {error}") from error


def _prune_stack(
    stack: list[_Part], G: Tensor, method: str, settings: Settings, ops: ModuleType, together: bool
) -> list[LayerResult]:
    started = time.perf_counter()
    saliency = METHODS[method].saliency or settings.warm_start
    rows = _stacked(stack, G, saliency, settings, together, ops, METHODS[method].damps)
    weights = [part.weight for part in stack]
    errors, kept, bounded, start = [], [], False, 0

    def choose(chunk: slice) -> Choice:
        return METHODS[method].choose(rows[chunk], settings, ops)

    for choice in _by_chunks(choose, rows.W, settings.memory if together else None, stack[0].name, ops):
        _write(weights, start, choice)
        start += len(choice.mask)
        kept.append(choice.mask.sum(1))
        bounded = choice.bound is not None
        bound = choice.bound if bounded else torch.zeros_like(choice.error)
        errors.append(torch.stack([choice.error_warm_start, choice.error_mask, choice.error, bound]).double())
    lengths = [len(weight) for weight in weights]
    # Without the rows that only fill up the stack.
    sums = [x[..., : sum(lengths)].split(lengths, dim=-1) for x in (torch.cat(errors, 1), torch.cat(kept))]
    share = (time.perf_counter() - started) / sum(lengths)
    results = []
    for part, layer_errors, layer_kept in zip(stack, *sums, strict=True):
        warm, mask, error, bound = layer_errors.sum(1).tolist()
        results.append(
            LayerResult(
                name=part.name,
                shape=tuple(part.weight.shape),
                pattern=settings.pattern.text,
                kept=layer_kept.sum().item(),
                method=method,
                warm_start=saliency,
                alpha=settings.alpha if method == "sparsefw" else None,
                steps=settings.steps if method == "sparsefw" else 0,
                target=part.target,
                error_warm_start=warm,
                error_mask=mask,
                error=error,
                relative_mask=mask / warm if warm else 1.0,
                relative_error=error / warm if warm else 1.0,
                gap=mask - bound if bounded else None,
                seconds=share * len(part.weight),
                # A parameter is stored row by row, and the weight is a view of it.
                transposed=part.weight.stride(0) < part.weight.stride(1),
            )
        )
    return results


def _by_chunks(
    solve: Callable[[slice], Result], W: Tensor, memory: int | None, name: str, ops: ModuleType
) -> Iterator[Result]:
    """solve(rows) for chunks of the rows of W, in their order.

    On a CPU as many are solved at once as torch has threads, each on one thread: the operations on a chunk are too
    short to share out one by one, and numpy's selection knows one thread only.

    Args:
        solve: called with the rows of a chunk, on a CPU in another thread.
        W: (rows, d).
        memory: bytes that the state of the chunks may take; None solves all rows at once.
        name: of the layer to blame.
        ops: the kernels.

    Raises:
        InputError: no chunk fits the memory.
    """
    if memory is None:
        yield solve(slice(None))
        return
    unit = BYTES_PER_ENTRY * W.shape[1] * ROW_UNIT
    units = memory // unit
    if not units:
        raise InputError(
            f"{name}: a solve needs {unit / 2**30:.3f} GiB at least, and {memory / 2**30:.3f} are set aside"
        )
    on_cpu, before = W.device.type == "cpu", torch.get_num_threads()
    # Triton's interpreter is for one thread only.
    threads = min(before, units) if on_cpu and ops is cpu else 1
    if on_cpu:
        # As many chunks for every thread.
        units = min(units // threads, cpu_rows(W.shape[1]) // ROW_UNIT)
        turns = -(-len(W) // (threads * units * ROW_UNIT))
        units = -(-len(W) // (threads * turns * ROW_UNIT))
    height = units * ROW_UNIT
    chunks = [slice(start, start + height) for start in range(0, len(W), height)]
    if not on_cpu or ops is not cpu:
        yield from map(solve, chunks)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(solve, chunks)
    finally:
        torch.set_num_threads(before)


def cpu_rows(d: int) -> int:
    """Rows of d entries that a thread solves at a time on a CPU, at most."""
    return max(CPU_ROWS, CPU_ENTRIES // d // ROW_UNIT * ROW_UNIT)


def _stacked(
    stack: list[_Part], G: Tensor, saliency: str, settings: Settings, together: bool, ops: ModuleType, damps: bool
) -> Rows:
    """The layers' rows one below the other; `together`, filled up to a multiple of ROW_UNIT with rows of zeros."""
    pattern = settings.pattern
    lengths = [len(part.weight) for part in stack]
    missing = -sum(lengths) % ROW_UNIT if together else 0
    # A CPU has no bf16 or fp16 arithmetic worth using; fp32 holds the same weights.
    dtype = torch.float32 if G.device.type == "cpu" else stack[0].weight.dtype
    W = _below([part.weight for part in stack], sum(lengths) + missing, dtype)
    lacks, H = None, damped(G, settings.damp) if damps else None
    if any(part.cross is not None for part in stack):
        lacks, start = None if settings.refit else torch.empty_like(W, dtype=torch.float32), 0
        for T in _targets(stack, W, H, settings, together, ops):
            rows = slice(start, start + len(T))
            # Refitted weights start from the target; those that stay as they are can only be chosen for it.
            if settings.refit:
                W[rows] = T
            else:
                lacks[rows] = T - W[rows]
            start += len(T)
    saliencies = [SALIENCIES[saliency](part, G.diagonal()) for part in W[: sum(lengths)].split(lengths)]
    if settings.whole:
        k = patterns.kept_in_layer(pattern, *W.shape)
    else:
        ks = [patterns.budget(pattern, s) for s in saliencies]
        k = nn.functional.pad(torch.cat(ks), (0, missing)) if isinstance(ks[0], Tensor) else ks[0]
    S = _below(saliencies, len(W), torch.float32)
    return Rows(W, G, S, k, stack[0].weight.dtype, lacks, H)


def _below(parts: list[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    """Matrices one below the other, and zeros below them, (rows, d); each is gone from the list once it is copied."""
    stacked, start = torch.empty(rows, parts[0].shape[1], dtype=dtype, device=parts[0].device), 0
    while parts:
        part = parts.pop(0)
        stacked[start : start + len(part)] = part
        start += len(part)
        del part
    stacked[start:] = 0
    return stacked


def _targets(
    stack: list[_Part], W: Tensor, H: Tensor, settings: Settings, together: bool, ops: ModuleType
) -> Iterator[Tensor]:
    """The targets of stacked rows W, (rows, d) fp32 in chunks; layers without a cross matrix, and rows that fill up,
    keep W."""
    crosses = []
    for part in stack:
        none = torch.zeros((), device=W.device).expand(part.weight.shape)
        crosses.append(none if part.cross is None else part.cross)
        part.cross = None
    B = crosses[0] if len(crosses) == 1 and len(crosses[0]) == len(W) else _below(crosses, len(W), torch.float32)

    def find(rows: slice) -> Tensor:
        return target(W[rows], H, B[rows], TARGET_STEPS, precision=settings.precision, ops=ops)

    yield from _by_chunks(find, W, settings.memory if together else None, stack[0].name, ops)


def _write(weights: list[Tensor], start: int, choice: Choice) -> None:
    """Write the rows of a chunk, which begin at row `start` of the stack, into the layers they belong to."""
    first = 0
    for weight in weights:
        low, high = max(start, first), min(start + len(choice.mask), first + len(weight))
        if low < high:
            mask = choice.mask[low - start : high - start]
            if choice.weight is None:
                weight[low - first : high - first] = keep(weight[low - first : high - first], mask)
            else:
                weight[low - first : high - first] = choice.weight[low - start : high - start]
        first += len(weight)
