"""The operations of naive_fits.py, arranged for a CPU as cpu.py does it: few passes, few temporaries.

A temporary as large as a chunk of rows costs more than the arithmetic on it when the system has to hand out its memory.
"""

import numpy as np
import torch
from torch import Tensor

from .naive import check_budget
from .naive_fits import CONVERGED, ratio
from .topk_torch import as_float, at_least, masked, row_blocks, select


def removed(W: Tensor, mask: Tensor, target_gap: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """target_gap + W * (1 - mask). See `naive_fits.removed`."""
    E = masked(W, ~mask)
    if target_gap is not None:
        # In place where the sum has the dtype of W.
        E = E.add_(target_gap) if E.dtype == target_gap.dtype else target_gap + E
    return E if out is None else out.copy_(E)


def begin_fit(W: Tensor, start: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Z = mask * start, and W - Z. See `naive_fits.begin_fit`."""
    Z = masked(start.float(), mask)
    return Z, torch.sub(W, Z).to(dtype)


def row_errors(W: Tensor, R: Tensor, Z: Tensor | None = None) -> Tensor:
    """sum((W - Z) * R) of every row. See `naive_fits.row_errors`."""
    E = W * R if Z is None else W.float().sub(Z).mul_(R)
    return E.sum(1)


def take_rows(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """X[taken] = Y[taken]. See `naive_fits.take_rows`."""
    if X.device.type != "cpu":
        # Without a list of the rows, for which the host would wait.
        X.copy_(torch.where(taken[:, None], Y, X))
        return
    rows = torch.from_numpy(np.flatnonzero(taken.numpy()))
    if len(rows):
        X.index_copy_(0, rows, Y[rows])


def candidates(
    Z: Tensor,
    R: Tensor,
    mask: Tensor,
    inverse: Tensor,
    root: Tensor,
    *,
    margin: Tensor | None = None,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Candidates and their scores. See `naive_fits.candidates`."""
    T = masked(R * inverse, ~mask if support is None else ~mask & support).add_(Z)
    score = torch.abs(T).mul_(root)
    return T, score if margin is None else score.mul_(as_float(mask).mul_(margin[:, None]).add_(1))


def bound_scores(
    W: Tensor, R: Tensor, M: Tensor, *, target_gap: Tensor | None = None, damping: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """W * R without the share of the damping, and its constant. See `naive_fits.bound_scores`."""
    if damping is not None:
        E = (1 - M).mul_(W)
        E = E if target_gap is None else E.add_(target_gap)
        R = torch.sub(R, E.mul_(damping), out=E)
    return W * R, R.new_zeros(len(R)) if target_gap is None else (target_gap * R).sum(1)


def bound_sums(score: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """sum(score * (1 + M - 2 V)). See `naive_fits.bound_sums`."""
    return as_float(V).mul_(-2).add_(M).add_(1).mul_(score).sum(1)


def round_mask(M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
    """The mask of the k highest M, ties by saliency. See `naive_fits.round_mask`.

    A row (or group) with exactly k entries of at least 1/2 keeps these. After a penalty nearly all rows are such, and
    numpy takes several times as long to partition entries that are all 0 or 1.
    """
    check_budget(M.shape, k, group)
    shape, width = M.shape, group or M.shape[1]
    M, saliency = M.reshape(-1, width), saliency.reshape(-1, width)
    V = at_least(M, 0.5)
    count = V.view(torch.uint8).sum(1, dtype=torch.int32)
    rest = (count != (k.to(M.device) if isinstance(k, Tensor) else k)).nonzero().squeeze(1)
    if len(rest):
        m, budget = M[rest], k.to(M.device)[rest] if isinstance(k, Tensor) else k
        first = torch.empty(m.shape, dtype=torch.bool, device=m.device)
        select(m, budget, group=group, fixed=None, positive=False, out=first)
        lowest = m.add(as_float(~first), alpha=2).amin(1, keepdim=True)
        order = as_float(at_least(m, lowest)).sub_(as_float(at_least(lowest, m)))
        order.mul_(torch.finfo(torch.float32).max).add_(saliency[rest])
        V[rest] = select(order, budget, group=group, fixed=None, positive=False, out=first)
    return V.view(shape)


def conjugate_step(
    Z: Tensor,
    R: Tensor,
    P: Tensor,
    U: Tensor,
    rz: Tensor,
    enough: Tensor,
    inverse: Tensor,
    *,
    mask: Tensor | None = None,
    first: bool = False,
    last: bool = False,
) -> None:
    """One step of conjugate gradients of every row, in place, in blocks of rows. See `naive_fits.conjugate_step`."""
    for rows in row_blocks(Z):
        r, p = R[rows], P[rows].float()
        if not first:
            u, before = U[rows], rz[rows]
            a = ratio(before, (p * u).sum(1)).masked_fill_(before <= enough[rows], 0)[:, None]
            Z[rows].addcmul_(p, a)
            r.addcmul_(u, -a)
        if last:
            continue
        r = r if mask is None else masked(r, mask[rows])
        z = r * inverse
        now = (r * z).sum(1)
        if first:
            p.copy_(z)
            enough[rows] = CONVERGED * now
        else:
            p.mul_(ratio(now, before)[:, None]).add_(z)
        if p.dtype != P.dtype:
            P[rows] = p
        rz[rows] = now
