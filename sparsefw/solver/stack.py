"""Stacks the rows of layers that read the same input: weights, targets, saliencies, budgets."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsefw.kernels.backend import Backend, Terms
from sparsefw.ranks import shares
from sparsefw.solver import patterns
from sparsefw.solver.choices import Rows
from sparsefw.solver.chunks import ROW_UNIT, by_chunks
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.methods import METHODS
from sparsefw.solver.objective import damped
from sparsefw.solver.saliency import SALIENCIES
from sparsefw.solver.target import Cross, cross_rows, find_target

# Conjugate-gradient steps from a layer's weight to its target.
TARGET_STEPS = 4


@dataclass
class Member:
    """A layer in a stack. `cross`, see `target`, is dropped when the stack's targets are computed."""

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


def cost_of_solve(rows: int, d: int) -> int:
    """Flops of a product of rows, and of a decomposition of the Gram matrix: what whole solves are shared out by."""
    return rows * d**2 + d**3


def rows_by_rank(lengths: Sequence[int], count: int) -> list[list[slice]]:
    """The rows of each layer of a stack that each rank solves, by layer, then by rank."""
    parts = shares(_padded(sum(lengths)), count, ROW_UNIT)
    return [list(rows) for rows in zip(*(rows_within(lengths, part) for part in parts), strict=True)]


def stack_rows(stack: Stack, share: slice) -> Rows:
    """Rows of a stack, one below the other.

    Args:
        stack: the stack; its layers lose their cross matrices.
        share: the rows of the stack that are wanted. Those behind the last layer are zero.
    """
    G, method, config, backend = stack.G, stack.method, stack.config, stack.backend
    parts = stack.weights(share)
    own, lengths = parts[0].dtype, [len(part) for part in parts]
    padding = share.stop - share.start - sum(lengths)
    # bf16 and fp16 arithmetic is slow on a CPU; fp32 holds the same weights.
    W = _stack_padded(parts, sum(lengths) + padding, torch.float32 if G.device.type == "cpu" else own)
    support = W != 0 if config.keep_zeros else None
    exact = backend.exact_operand(G, own)
    # Refits and targets only multiply with the damped matrix. Swaps of masks need it exactly.
    of_products = torch.bfloat16 if config.refit and backend.precision == "bf16" else torch.float32
    target_gap, H = None, damped(G, config.damp, of_products) if METHODS[method].uses_damping else None
    if any(member.cross is not None for member in stack.members):
        assert H is not None
        target_gap, start = None if config.refit else torch.empty_like(W, dtype=torch.float32), 0
        for T in _targets(stack, share.start, W, exact, H, support):
            rows = slice(start, start + len(T))
            # A refit starts from the target. Without one, only the mask can be chosen for it. Rows whose mask stays as
            # it is keep the target's own weights, so these are what can be written.
            if target_gap is None:
                most = min(torch.finfo(own).max, torch.finfo(T.dtype).max)
                W[rows] = T.clamp(-most, most).to(own)
            else:
                target_gap[rows] = T - W[rows]
            start += len(T)
    saliency = SALIENCIES[METHODS[method].saliency or config.warm_start]
    saliencies = [saliency(part, G.diagonal()) for part in W[: sum(lengths)].split(lengths)]
    k = _kept(saliencies, config, whole_matrix=method == "sparsefw" and config.whole_matrix, padding=padding)
    S = _stack_padded(saliencies, len(W), torch.float32)
    return Rows(W, G, S, k, own, target_gap, H, support, exact)


def _kept(saliencies: list[Tensor], config: PruneConfig, *, whole_matrix: bool, padding: int) -> int | Tensor:
    """The budgets of the stacked rows, see `Rows.k`; `padding` rows of zeros pad the stack."""
    if whole_matrix:
        return patterns.kept_in_layer(config.pattern, *saliencies[0].shape)
    ks = [patterns.kept(config.pattern, saliency) for saliency in saliencies]
    if not any(isinstance(k, Tensor) or k != ks[0] for k in ks):
        return ks[0]
    device = saliencies[0].device
    rows = [torch.as_tensor(k, device=device).expand(len(s)) for k, s in zip(ks, saliencies, strict=True)]
    return nn.functional.pad(torch.cat(rows), (0, padding))


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


def _targets(
    stack: Stack, first: int, W: Tensor, G: Tensor | Terms, H: Tensor, support: Tensor | None
) -> Iterator[Tensor]:
    """The targets of stacked rows W, of which the first has this number, in chunks of rows, (rows, d) fp32.

    G comes from `Backend.exact_operand`, and H is the damped matrix. For the other arguments see `stack_rows`.

    The target of a layer without a cross matrix is its weight, and that of the padding is zero.
    """
    crosses = [(member.cross, len(member.weight)) for member in stack.members]
    for member in stack.members:
        if member.cross is not None:
            member.cross.arrived.wait()
            member.cross = None

    def find(rows: slice) -> Tensor:
        B = cross_rows(crosses, first + (rows.start or 0), W[rows], G, backend=stack.backend)
        support_of_rows = None if support is None else support[rows]
        return find_target(W[rows], H, B, TARGET_STEPS, support=support_of_rows, backend=stack.backend)

    yield from by_chunks(find, W, stack.memory, stack.members[0].name, stack.backend)
