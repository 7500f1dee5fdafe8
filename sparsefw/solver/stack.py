"""Stacks of layers that read the same input, and chunks of their rows.

A stack has the layers' rows one below the other, with their targets, saliencies and budgets. It is solved in chunks
whose state fits the memory, and on a CPU the caches too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.kernels import cpu
from sparsefw.kernels.backend import Backend, Terms
from sparsefw.ranks import shares
from sparsefw.solver import patterns
from sparsefw.solver.config import METHODS, PruneConfig
from sparsefw.solver.frank_wolfe import Problem
from sparsefw.solver.methods import SALIENCIES
from sparsefw.solver.patterns import Pattern
from sparsefw.solver.refit import Cross, cross_rows, find_target

# The rows of stacks and chunks are multiples of this. A matrix product handles a remainder of rows in another order of
# summation. Without a remainder, a row's result does not depend on the rows beside it.
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

Result = TypeVar("Result")


@dataclass
class Member:
    """A layer in a stack. `cross`, see `refit`, is dropped when the stack's targets are computed."""

    name: str
    weight: Tensor
    cross: Cross | None
    target: str


@dataclass(frozen=True)
class Stack:
    """Layers that are solved together, one below the other.

    Attributes:
        members: the layers.
        G: (d, d) fp32 Gram matrix of their input.
        method: one of METHODS.
        config: the config of the run.
        backend: the operations.
        memory: bytes for the state of the chunks, see `by_chunks`. Unless it is None, rows of zeros pad the stack to a
            multiple of ROW_UNIT.
    """

    members: list[Member]
    G: Tensor
    method: str
    config: PruneConfig
    backend: Backend
    memory: int | None

    @property
    def lengths(self) -> list[int]:
        """The rows of each layer."""
        return [len(member.weight) for member in self.members]

    @property
    def height(self) -> int:
        """All rows, with those that pad the stack."""
        rows = sum(self.lengths)
        return rows if self.memory is None else _padded(rows)

    def weights(self, share: slice) -> list[Tensor]:
        """The rows of each layer's weight that lie in a share of the stack: views."""
        parts = zip(self.members, rows_within(self.lengths, share), strict=True)
        return [member.weight[rows] for member, rows in parts]


def _padded(rows: int) -> int:
    return -(-rows // ROW_UNIT) * ROW_UNIT


def rows_within(lengths: Iterable[int], share: slice) -> list[slice]:
    """The rows of each layer that lie in a share of the stack."""
    found, start = [], 0
    for length in lengths:
        low, high = (min(max(end - start, 0), length) for end in (share.start, share.stop))
        found.append(slice(low, high))
        start += length
    return found


def rows_by_rank(lengths: Sequence[int], count: int) -> list[list[slice]]:
    """The rows of each layer of a stack that each rank solves, by layer, then by rank."""
    parts = shares(_padded(sum(lengths)), count, ROW_UNIT)
    return [list(rows) for rows in zip(*(rows_within(lengths, part) for part in parts), strict=True)]


def stack_rows(stack: Stack, share: slice) -> Problem:
    """Rows of a stack, one below the other.

    Args:
        stack: the stack; its layers lose their cross matrices.
        share: the rows of the stack that are wanted. Those behind the last layer are zero.
    """
    G, method, config, backend = stack.G, METHODS[stack.method], stack.config, stack.backend
    parts = stack.weights(share)
    own, lengths = parts[0].dtype, [len(part) for part in parts]
    padding = share.stop - share.start - sum(lengths)
    # bf16 and fp16 arithmetic is slow on a CPU; fp32 holds the same weights.
    start = _stack_padded(parts, sum(lengths) + padding, torch.float32 if G.device.type == "cpu" else own)
    support = start != 0 if config.keep_zeros else None
    exact = backend.exact_operand(G, own)
    # Refits and targets only multiply with the damped matrix. Swaps of masks need it exactly.
    of_products = torch.bfloat16 if config.refit and backend.precision == "bf16" else torch.float32
    H = damped(G, config.damp, of_products) if method.uses_target else G
    target_gap = _to_targets(stack, share.start, start, exact, H, support)
    saliency = SALIENCIES[method.saliency or config.warm_start]
    saliencies = [saliency(part, G.diagonal()) for part in start[: sum(lengths)].split(lengths)]
    k = kept(saliencies, config.pattern, padding=padding)
    S = _stack_padded(saliencies, len(start), torch.float32)
    return Problem(start, G, H, S, k, config.pattern.group, exact, own, target_gap, support)


def kept(saliencies: list[Tensor], pattern: Pattern, padding: int = 0) -> int | Tensor:
    """The budgets of the stacked rows, see `Problem.k`; `padding` rows of zeros pad the stack.

    A `layer:` budget goes to the highest saliencies of a whole matrix, and each row keeps the number that it got.
    """
    d = saliencies[0].shape[1]
    if pattern.scope == "group":
        return patterns.kept_in_group(pattern)
    if pattern.scope == "row":
        return patterns.kept_in_row(pattern, d)
    budgets = [(s, patterns.kept_in_layer(pattern, len(s), d)) for s in saliencies]
    # A NaN shows in the errors, which name the layer.
    highest = [cpu.lmo(s.reshape(1, -1), budget, checked=False).view(s.shape) for s, budget in budgets]
    return nn.functional.pad(torch.cat([mask.sum(1) for mask in highest]), (0, padding))


def damped(G: Tensor, damp: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy of G (d, d) with damp max(diag G, FLOOR m) added to its diagonal, where m is the median of its positive
    entries.

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


def _stack_padded(parts: list[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    """Stack matrices and pad with zeros to `rows` rows, (rows, d). Each leaves the list when copied, to free memory."""
    stacked, start = torch.empty(rows, parts[0].shape[1], dtype=dtype, device=parts[0].device), 0
    while parts:
        part = parts.pop(0)
        stacked[start : start + len(part)] = part
        start += len(part)
        del part
    stacked[start:] = 0
    return stacked


def _to_targets(
    stack: Stack, first: int, W: Tensor, G: Tensor | Terms, H: Tensor, support: Tensor | None
) -> Tensor | None:
    """Replace stacked rows W, of which the first has this number, by their targets, chunk by chunk.

    The target of a layer without a cross matrix is its weight, and that of the padding is zero. Targets are rounded to
    the dtype that will be written: rows whose mask stays as it is keep the target's own weights.

    Args:
        stack: the stack; its layers lose their cross matrices.
        first, W, support: as in `stack_rows`.
        G: from `Backend.exact_operand`.
        H: the damped matrix.

    Returns:
        Without a refit only the mask can be chosen for a target. Then W stays, and this is the target minus W, (rows,
        d) fp32. Otherwise, and if no layer has a cross matrix, None.
    """
    crosses = [(member.cross, len(member.weight)) for member in stack.members]
    if not any(cross is not None for cross, _ in crosses):
        return None
    for member in stack.members:
        if member.cross is not None:
            member.cross.arrived.wait()
            member.cross = None
    gap = None if stack.config.refit else torch.empty_like(W, dtype=torch.float32)
    own = stack.members[0].weight.dtype
    most = min(torch.finfo(own).max, torch.finfo(torch.float32).max)

    def put(rows: slice) -> None:
        B = cross_rows(crosses, first + rows.start, W[rows], G, backend=stack.backend)
        support_of_rows = None if support is None else support[rows]
        T = find_target(W[rows], H, B, TARGET_STEPS, support=support_of_rows, backend=stack.backend)
        if gap is None:
            W[rows] = T.clamp(-most, most).to(own)
        else:
            gap[rows] = T - W[rows]

    for _ in by_chunks(put, W, stack.memory, stack.members[0].name, stack.backend):
        pass
    return gap


def cpu_rows(d: int) -> int:
    """The most rows of d entries that a thread solves at a time on a CPU."""
    return max(CPU_ROWS, CPU_ENTRIES // d // ROW_UNIT * ROW_UNIT)


def by_chunks(
    solve: Callable[[slice], Result], W: Tensor, memory: int | None, name: str, backend: Backend
) -> Iterator[Result]:
    """solve(rows) for chunks of the rows of W, in their order.

    On a CPU as many chunks are solved at once as torch has threads, each on one thread. The operations on a chunk are
    too short to be split over threads, and numpy's selection uses one thread only.

    Args:
        solve: called with the rows of a chunk, on a CPU in another thread.
        W: (rows, d).
        memory: bytes that the state of the chunks may take; None solves all rows at once.
        name: the layer's name, for the error.
        backend: the operations.

    Raises:
        InputError: no chunk fits the memory.
    """
    if not len(W):
        return
    if memory is None:
        yield solve(slice(0, len(W)))
        return
    threaded = W.device.type == "cpu" and backend.thread_safe
    threads = torch.get_num_threads() if threaded else 1
    height, threads = _height(W, memory, threads, name)
    chunks = [slice(start, start + height) for start in range(0, len(W), height)]
    if not threaded:
        yield from map(solve, chunks)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(solve, chunks)
    finally:
        torch.set_num_threads(before)


def _height(W: Tensor, memory: int, threads: int, name: str) -> tuple[int, int]:
    """The number of rows in a chunk, and the number of threads that the memory allows."""
    d = W.shape[1]
    unit = BYTES_PER_ENTRY * d * ROW_UNIT
    units = memory // unit
    if not units:
        raise InputError(
            f"{name}: a solve needs {unit / 2**30:.3f} GiB at least, and {memory / 2**30:.3f} are set aside"
        )
    threads = min(threads, units)
    if W.device.type == "cpu":
        units = min(units // threads, cpu_rows(d) // ROW_UNIT)
    # All threads get the same number of chunks, and chunks are alike.
    turns = -(-len(W) // (threads * units * ROW_UNIT))
    units = -(-len(W) // (threads * turns * ROW_UNIT))
    return units * ROW_UNIT, threads
