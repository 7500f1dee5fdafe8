"""Stack layers that read the same input into one problem, and cut the problem into chunks of rows.

A chunk is so small that the state of its solve fits the memory, and on a CPU the caches as well.
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

# The number of rows of a stack or chunk is a multiple of this. A matrix product sums a remainder of rows in another
# order. Without a remainder the result of a row does not depend on other rows.
ROW_UNIT = 64

# The longest chunk on a CPU, in rows, or in entries if that allows more rows. A longer chunk does not fit the caches.
# In a shorter one the work between two calls from Python is too little: threads wait for each other at the calls.
CPU_ROWS, CPU_ENTRIES = 384, 1 << 19

# Bytes of a solve for each entry of a chunk at the peak, as measured on a CPU (88 with the stack's W and saliency):
# fp32 W, T, the target gap, M, R, U, E, the refit's Z and R, temporaries of the row step, and bool masks.
BYTES_PER_ENTRY = 80


@dataclass(frozen=True)
class Stack:
    """Layers that are solved as one problem, with their rows one below the other.

    Attributes:
        names: name of each layer.
        weights: (out, in) weight of each layer.
        crosses: cross matrix of each layer or None, see `targets`. The list is emptied once the targets are computed.
        G: (in, in) fp32 Gram matrix of their input.
        method: properties of the method.
        config: the config of the run.
        backend: the operations.
        memory: bytes for the state of the chunks that are solved at the same time. Rows of zeros pad the stack to a
            multiple of ROW_UNIT. None: all rows are solved at once, without padding.
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
        For each layer a slice of its own rows and a slice of the part's; both may be empty.
    """
    found, start = [], 0
    for weight in weights:
        low, high = (min(max(end - start, 0), len(weight)) for end in (part.start, part.stop))
        first = start + low - part.start
        found.append((slice(low, high), slice(first, first + high - low)))
        start += len(weight)
    return found


def stack_rows(stack: Stack) -> Problem:
    """Make the problem of a stack. This empties `stack.crosses`, and the rows of the padding are zero."""
    G, config, backend = stack.G, stack.config, stack.backend
    own = stack.weights[0].dtype
    # A CPU is slow in bf16 and fp16, and fp32 holds the same weights.
    dtype = torch.float32 if G.device.type == "cpu" else own
    W = torch.zeros(stack.height, len(G), dtype=dtype, device=G.device)
    layers = [place for _, place in places(stack.weights, slice(0, stack.height))]
    for weight, layer in zip(stack.weights, layers, strict=True):
        W[layer] = weight
    support = W != 0 if config.keep_zeros else None
    exact, H = backend.exact_operand(G, own), G
    if stack.method.dense_target:
        # Swaps need H exactly. Refits and targets only multiply by it.
        only_products = config.refit and backend.precision == "bf16"
        H = damped(G, config.damp, torch.bfloat16 if only_products else torch.float32)
    target_gap = _to_targets(stack, W, exact, H, support)
    saliency = SALIENCIES[stack.method.saliency or config.warm_start]
    S = torch.zeros(W.shape, dtype=torch.float32, device=W.device)
    for layer in layers:
        S[layer] = saliency(W[layer], G.diagonal())
    k = kept(S, layers, config.pattern)
    return Problem(W, G, H, S, k, config.pattern.group, exact, own, target_gap, support)


def kept(saliency: Tensor, layers: list[slice], pattern: Pattern) -> int | Tensor:
    """Count the kept weights of stacked rows or their groups, as in `Problem.k`.

    A `layer:` budget selects the highest saliencies of a whole matrix. The number of those in a row is the row's k.

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
        # NaN is found later, in the errors, where the message names the layer.
        highest = cpu.lmo(matrix, pattern.kept(matrix.numel()), check_nan=False)
        k[layer] = highest.view(-1, d).sum(1)
    return k


def _to_targets(stack: Stack, W: Tensor, G: Tensor | Terms, H: Tensor, support: Tensor | None) -> Tensor | None:
    """Compute the targets of a stack chunk by chunk: with a refit they replace W in place, else the gap is returned.

    The target of a layer without a cross matrix is its own weight, and that of the padding is zero. Targets that
    replace W are rounded to the dtype that is written, since a row may be written with the target's own weights.

    Args:
        stack: the stack; its `crosses` are emptied.
        W, support: (rows, d) as in the `Problem`.
        G: Gram matrix from `Backend.exact_operand`.
        H: damped Gram matrix.

    Returns:
        Target gap T - W, (rows, d) fp32, where there is no refit. None with a refit, and without any cross matrix.
    """
    crosses = [*stack.crosses]
    stack.crosses.clear()
    if not any(crosses):
        return None
    gap = None if stack.config.refit else torch.empty_like(W, dtype=torch.float32)
    own = stack.weights[0].dtype
    most = torch.finfo(own).max

    def put(rows: slice) -> None:
        B = cross_rows(crosses, places(stack.weights, rows), W[rows], G, backend=stack.backend)
        support_of_rows = None if support is None else support[rows]
        T = find_target(W[rows], H, B, TARGET_STEPS, support=support_of_rows, backend=stack.backend)
        if gap is None:
            W[rows] = T.clamp(-most, most).to(own)
        else:
            gap[rows] = T - W[rows]

    with in_chunks(stack) as (chunks, run):
        for _ in run(put, chunks):
            pass
    return gap


def cpu_rows(d: int) -> int:
    """Return the most rows of d entries that one thread of a CPU solves at a time."""
    return max(CPU_ROWS, CPU_ENTRIES // d // ROW_UNIT * ROW_UNIT)


@contextmanager
def in_chunks(stack: Stack) -> Iterator[tuple[list[slice], Callable[..., Iterator[Any]]]]:
    """Cut a stack into chunks of rows whose state fits the memory.

    On a CPU each of torch's threads solves a chunk of its own at the same time. The operations on a chunk are too short
    to be split over threads, and numpy's selection uses one thread only.

    Yields:
        The chunks as slices of rows, and a function like `map` that solves them.

    Raises:
        InputError: the smallest chunk does not fit the memory.
    """
    if stack.memory is None:
        yield [slice(0, stack.height)], map
        return
    d = len(stack.G)
    unit = BYTES_PER_ENTRY * d * ROW_UNIT
    units = stack.memory // unit
    if not units:
        needed, given = unit / 2**30, stack.memory / 2**30
        raise InputError(f"{stack.names[0]}: a solve needs {needed:.3f} GiB at least, and {given:.3f} are set aside")
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
