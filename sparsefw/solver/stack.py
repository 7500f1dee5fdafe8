"""Stack layers that read the same input, and cut the stack into chunks of rows.

A stack has the layers' rows one below the other, with their targets, saliencies and budgets. It is solved in chunks
whose state fits the memory, and on a CPU the caches too.
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
from sparsefw.solver.refit import Cross, cross_rows, find_target

# The rows of stacks and chunks are multiples of this. A matrix product handles a remainder of rows in another order of
# summation. Without a remainder, a row's result does not depend on other rows.
ROW_UNIT = 64

# The longest chunk on a CPU, in rows, or in entries if that is more rows. A longer chunk does not fit the caches. A
# smaller one leaves too little work between two calls from Python, for which threads wait for each other.
CPU_ROWS, CPU_ENTRIES = 384, 1 << 19

# Memory of a solve per entry of a chunk at its peak, as measured on a CPU (88 with the stack's W and saliency): fp32 W,
# T, the gap between them, M, R, U, E, the fit's Z and R, temporaries of the row step, and bool masks.
BYTES_PER_ENTRY = 80

# Conjugate-gradient steps from a layer's weight to its target.
TARGET_STEPS = 4

# The damping of an input counts its diagonal entry as at least this share of the median entry of inputs that are not
# dead. Without it, the weights of a nearly dead input could become huge and ruin the first text in which it is alive.
FLOOR = 0.01


@dataclass(frozen=True)
class Stack:
    """Weights of layers that are solved together, one below the other.

    Attributes:
        names: the layers' names.
        weights: (out, in) weight of each layer.
        crosses: cross matrix of each layer or None, see `refit`. The list is emptied when the targets are computed.
        G: (in, in) fp32 Gram matrix of their input.
        method: what the method needs.
        config: the config of the run.
        backend: the operations.
        memory: bytes for the state of the chunks. Unless it is None, rows of zeros pad the stack to a multiple of
            ROW_UNIT; if it is, all rows are solved at once.
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
        """Count the rows, with padding."""
        rows = sum(map(len, self.weights))
        return rows if self.memory is None else -(-rows // ROW_UNIT) * ROW_UNIT


def places(weights: Iterable[Tensor], part: slice) -> list[tuple[slice, slice]]:
    """Find the rows of each layer that lie in a part of the stack, and their place in the part; both may be empty.

    Args:
        weights: (out, in) weight of each layer of the stack.
        part: rows of the stack.
    """
    found, start = [], 0
    for weight in weights:
        low, high = (min(max(end - start, 0), len(weight)) for end in (part.start, part.stop))
        first = start + low - part.start
        found.append((slice(low, high), slice(first, first + high - low)))
        start += len(weight)
    return found


def stack_rows(stack: Stack) -> Problem:
    """Make the problem of a stack, whose layers lose their cross matrices. Rows that pad the stack are zero."""
    G, config, backend = stack.G, stack.config, stack.backend
    own = stack.weights[0].dtype
    # bf16 and fp16 arithmetic is slow on a CPU; fp32 holds the same weights.
    dtype = torch.float32 if G.device.type == "cpu" else own
    W = torch.zeros(stack.height, len(G), dtype=dtype, device=G.device)
    layers = [place for _, place in places(stack.weights, slice(0, stack.height))]
    for weight, layer in zip(stack.weights, layers, strict=True):
        W[layer] = weight
    support = W != 0 if config.keep_zeros else None
    exact, H = backend.exact_operand(G, own), G
    if stack.method.dense_target:
        # Refits and targets only multiply with the damped matrix. Swaps of masks need it exactly.
        of_products = config.refit and backend.precision == "bf16"
        H = damped(G, config.damp, torch.bfloat16 if of_products else torch.float32)
    target_gap = _to_targets(stack, W, exact, H, support)
    saliency = SALIENCIES[stack.method.saliency or config.warm_start]
    S = torch.zeros(W.shape, dtype=torch.float32, device=W.device)
    for layer in layers:
        S[layer] = saliency(W[layer], G.diagonal())
    k = kept(S, layers, config.pattern)
    return Problem(W, G, H, S, k, config.pattern.group, exact, own, target_gap, support)


def kept(saliency: Tensor, layers: list[slice], pattern: Pattern) -> int | Tensor:
    """Count what stacked rows keep, see `Problem.k`.

    A `layer:` budget goes to the highest saliencies of a whole matrix, and each row keeps the number that it got.

    Args:
        saliency: (rows, d) fp32.
        layers: the rows of each layer.
        pattern: what is kept.
    """
    rows, d = saliency.shape
    if pattern.scope != "layer":
        return pattern.kept(pattern.group or d)
    k = torch.zeros(rows, dtype=torch.int64, device=saliency.device)
    for layer in layers:
        matrix = saliency[layer].reshape(1, -1)
        # A NaN shows in the errors, which name the layer.
        highest = cpu.lmo(matrix, pattern.kept(matrix.numel()), checked=False)
        k[layer] = highest.view(-1, d).sum(1)
    return k


def damped(G: Tensor, damp: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Damp a copy of G (d, d): add damp max(diag G, FLOOR m) to its diagonal, m the median of its positive entries.

    Damping treats every input as slightly more independent of the others. It draws refitted weights towards the layer's
    own, and masks towards the weights that matter most by themselves.

    Args:
        G: (d, d) fp32.
        damp: share of the diagonal that is added.
        dtype: dtype of the result. In fp32 and without damping it is G itself.
    """
    if not damp:
        return G.to(dtype)
    diagonal = G.diagonal()
    H = G.to(dtype, copy=True)
    # NaN, if all inputs are dead.
    median = diagonal.where(diagonal > 0, torch.nan).nanmedian().item()
    H.diagonal().copy_(diagonal + diagonal.clamp(min=FLOOR * median if median > 0 else 0.0) * damp)
    return H


def _to_targets(stack: Stack, W: Tensor, G: Tensor | Terms, H: Tensor, support: Tensor | None) -> Tensor | None:
    """Replace the rows W of a stack by their targets, chunk by chunk.

    The target of a layer without a cross matrix is its weight, and that of the padding is zero. Targets are rounded to
    the dtype that will be written: rows whose mask stays as it is keep the target's own weights.

    Args:
        stack: the stack; its layers lose their cross matrices.
        W, support: (rows, d) as in the `Problem`.
        G: from `Backend.exact_operand`.
        H: the damped matrix.

    Returns:
        Without a refit only the mask can be chosen for a target. Then W stays, and this is the target minus W, (rows,
        d) fp32. Otherwise, and if no layer has a cross matrix, None.
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
    """Limit the rows of d entries that a thread solves at a time on a CPU."""
    return max(CPU_ROWS, CPU_ENTRIES // d // ROW_UNIT * ROW_UNIT)


@contextmanager
def in_chunks(stack: Stack) -> Iterator[tuple[list[slice], Callable[..., Iterator[Any]]]]:
    """Cut a stack into chunks of rows whose state fits the memory.

    On a CPU as many chunks are solved at once as torch has threads, each on one thread. The operations on a chunk are
    too short to be split over threads, and numpy's selection uses one thread only.

    Yields:
        The chunks, and a `map` that solves them.

    Raises:
        InputError: no chunk fits the memory.
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
    # All threads get the same number of chunks, and chunks are alike.
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
