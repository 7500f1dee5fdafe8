"""Stack layers that read the same input into one problem, and cut the problem into chunks of rows.

A chunk is so small that the state of its solve fits into the memory limit and, on a CPU, into the caches.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.kernels import cpu
from sparsefw.kernels.backend import Backend, Terms
from sparsefw.solver.config import Method, PruneConfig
from sparsefw.solver.frank_wolfe import Problem
from sparsefw.solver.methods import SALIENCIES
from sparsefw.solver.patterns import Pattern
from sparsefw.solver.targets import TARGET_STEPS, Cross, cross_rows, damped, find_target

# The number of rows of a stack or chunk is a multiple of this. A matrix product may sum leftover rows in another order.
# Without leftover rows the result of a row does not depend on the number of rows.
ROW_UNIT = 64

# The longest chunk on a CPU has CPU_ROWS rows, or CPU_ENTRIES entries if that allows more rows. A longer chunk does not
# fit into the caches. In a shorter one each operation takes so little time that threads wait for each other in Python.
CPU_ROWS, CPU_ENTRIES = 384, 1 << 19

# Peak bytes of a solve for each entry of a chunk, as measured on a CPU: fp32 W, T, the target gap, M, R, U, E, the
# refit's Z and R, temporaries of the row step, and bool masks. W and saliency of the whole stack take 8 more.
BYTES_PER_ENTRY = 80


@dataclass(frozen=True)
class Stack:
    """Layers that are solved as one problem, with their rows one below the other.

    Attributes:
        names: name of each layer.
        weights: (out, in) weight of each layer.
        crosses: cross matrix of each layer or None, see `targets`. The list is emptied before targets are computed.
        G: (in, in) fp32 Gram matrix of the layers' input.
        method: properties of the method.
        config: the config of the run.
        backend: the operations.
        memory: limit in bytes for the state of all chunks that are solved at the same time. Rows of zeros pad the stack
            to a multiple of ROW_UNIT. None: the stack is solved as a whole, without padding.
    """

    names: list[str]
    weights: list[Tensor]
    crosses: list[Cross | None]
    G: Tensor
    method: Method
    config: PruneConfig
    backend: Backend
    memory: int | None

    @property
    def height(self) -> int:
        """Count the rows, the padding included."""
        rows = sum(map(len, self.weights))
        return rows if self.memory is None else -(-rows // ROW_UNIT) * ROW_UNIT


def places(weights: Iterable[Tensor], part: slice) -> list[tuple[slice, slice]]:
    """Find which rows of each layer lie in a part of the stack, and where they lie in the part.

    Args:
        weights: (out, in) weight of each layer of the stack.
        part: a slice of the stack's rows.

    Returns:
        For each layer the slice of its rows that lie in the part, and the slice of the part that holds them. Both may
        be empty.
    """
    found, start = [], 0
    for weight in weights:
        low, high = (min(max(end - start, 0), len(weight)) for end in (part.start, part.stop))
        first = start + low - part.start
        found.append((slice(low, high), slice(first, first + high - low)))
        start += len(weight)
    return found


def stack_rows(stack: Stack) -> Problem:
    """Make the problem of a stack, with padding rows of zeros. Empties `stack.crosses`."""
    G, config, backend = stack.G, stack.config, stack.backend
    own = stack.weights[0].dtype
    # A CPU is slow in bf16 and fp16, and fp32 represents the same weights exactly.
    dtype = torch.float32 if G.device.type == "cpu" else own
    W = torch.zeros(stack.height, len(G), dtype=dtype, device=G.device)
    layers = [place for _, place in places(stack.weights, slice(0, stack.height))]
    for weight, layer in zip(stack.weights, layers, strict=True):
        W[layer] = weight
    support = W != 0 if config.keep_zeros else None
    exact, H = backend.exact_operand(G, own), G
    if stack.method.damps(config):
        # Without a refit, swaps need H exactly. With a refit, H is only a factor of products.
        only_products = stack.method.refits and config.refit and backend.precision == "bf16"
        H = damped(G, config.damp, torch.bfloat16 if only_products else torch.float32)
    target_gap = _to_targets(stack, W, exact, H, support)
    own_saliency, warm = stack.method.saliency or config.warm_start, None
    # The last one is the method's own.
    for name in dict.fromkeys([config.warm_start, own_saliency]):
        S = torch.zeros(W.shape, dtype=torch.float32, device=W.device)
        for layer in layers:
            S[layer] = SALIENCIES[name](W[layer], G)
        k = kept(S, layers, config.pattern)
        if name != own_saliency:
            # The errors of all methods are relative to this mask's. The method finds NaN.
            warm = backend.lmo(S, k, group=config.pattern.group, check_nan=False)
            del S
    return Problem(W, G, H, S, k, config.pattern.group, exact, own, target_gap, support, warm=warm)


def kept(saliency: Tensor, layers: list[slice], pattern: Pattern) -> int | Tensor:
    """Compute the budgets of stacked rows or of their groups, as in `Problem.k`.

    A `layer:` budget selects the highest saliencies of a whole matrix. The number selected in a row is the row's k.

    Args:
        saliency: (rows, d) fp32.
        layers: slice of the rows of each layer.
        pattern: the pattern of sparsity.
    """
    rows, d = saliency.shape
    if pattern.scope != "layer":
        return pattern.kept(pattern.group or d)
    k = torch.zeros(rows, dtype=torch.int64, device=saliency.device)
    for layer in layers:
        matrix = saliency[layer].reshape(1, -1)
        # Not checked for NaN here: the check of the errors finds NaN later, and names the layer.
        highest = cpu.lmo(matrix, pattern.kept(matrix.numel()), check_nan=False)
        k[layer] = highest.view(-1, d).sum(1)
    return k


def _to_targets(stack: Stack, W: Tensor, G: Tensor | Terms, H: Tensor, support: Tensor | None) -> Tensor | None:
    """Compute the targets of a stack, chunk by chunk.

    With a refit the targets replace W in place. Without a refit the target gap is returned. A layer without a cross
    matrix has its own weight as its target, and the padding has zeros. Targets that replace W are rounded to the
    checkpoint's dtype, since they may be written as the kept weights of a row.

    Args:
        stack: the stack; its list `crosses` is emptied.
        W, support: (rows, d) as in the `Problem`.
        G: Gram matrix from `Backend.exact_operand`.
        H: damped Gram matrix.

    Returns:
        Target gap T - W, (rows, d) fp32; None with a refit, or if no layer has a cross matrix.
    """
    crosses = [*stack.crosses]
    stack.crosses.clear()
    if not any(crosses):
        return None
    gap = None if stack.config.refit else torch.empty_like(W, dtype=torch.float32)
    own = stack.weights[0].dtype
    largest = torch.finfo(own).max

    def put(rows: slice) -> None:
        B = cross_rows(crosses, places(stack.weights, rows), W[rows], G, backend=stack.backend)
        support_of_rows = None if support is None else support[rows]
        T = find_target(W[rows], H, B, TARGET_STEPS, support=support_of_rows, backend=stack.backend)
        if gap is None:
            W[rows] = T.clamp(-largest, largest).to(own)
        else:
            gap[rows] = T - W[rows]

    with in_chunks(stack) as (chunks, run):
        for _ in run(put, chunks):
            pass
    return gap


def cpu_rows(d: int) -> int:
    """Return the maximum height of a CPU's chunk with rows of d entries."""
    return max(CPU_ROWS, CPU_ENTRIES // d // ROW_UNIT * ROW_UNIT)


@contextmanager
def in_chunks(stack: Stack) -> Iterator[tuple[list[slice], Callable[..., Iterator[Any]]]]:
    """Cut a stack into chunks of rows whose state fits into the memory limit.

    On a CPU, torch's threads solve different chunks at the same time. The operations on one chunk are too short to be
    split over threads, and numpy's selection uses one thread only.

    Yields:
        The chunks as slices of rows, and `map` or a `map` over threads, with which the caller solves them.

    Raises:
        InputError: the smallest chunk does not fit into the memory limit.
    """
    if stack.memory is None:
        yield [slice(0, stack.height)], map
        return
    d = len(stack.G)
    unit = BYTES_PER_ENTRY * d * ROW_UNIT
    units = stack.memory // unit
    if not units:
        needed, given = unit / 2**30, stack.memory / 2**30
        raise InputError(f"{stack.names[0]}: a solve needs at least {needed:.3f} GiB of memory, but has {given:.3f}")
    before = torch.get_num_threads()
    on_cpu = stack.G.device.type == "cpu"
    threaded = on_cpu and stack.backend.thread_safe
    threads = min(before, units) if threaded else 1
    if on_cpu:
        units = min(units // threads, cpu_rows(d) // ROW_UNIT)
    # All threads get the same number of chunks, and chunks have nearly the same height.
    rows = max(1, stack.height)
    turns = -(-rows // (threads * units * ROW_UNIT))
    height = -(-rows // (threads * turns * ROW_UNIT)) * ROW_UNIT
    chunks = [slice(start, min(start + height, stack.height)) for start in range(0, stack.height, height)]
    if not threaded:
        yield chunks, map
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield chunks, pool.map
    finally:
        torch.set_num_threads(before)
