"""Select the k best scores of every row or group, for `--kernel torch`.

Exactly k entries are kept (with `positive` fewer, if fewer scores are above 0), and equal scores go to the lower index.
selection.cpp selects on a CPU if it was compiled at installation; else numpy and torch select the same entries.
"""

import torch
from torch import Tensor

from ..definitions import check_budget
from ..masks import as_float, at_least, infinite
from .library import level, library

# Number of entries of the longest row that selection.cpp takes. Keys of longer rows leave a core's cache, and numpy's
# partition is faster: twice as fast for 2^22 entries on a processor with AVX-512.
LONGEST = 1 << 18

# The smallest float above 0.
SMALLEST_FLOAT = 2.0**-149

# On a GPU one program selects from a row. With fewer rows than this most of the GPU would be idle. With `layer:0.6`,
# for example, all entries of a matrix are one row.
FEW_ROWS = 16

# Rank of -inf in `_in_order`. Lower ranks belong to NaN.
LOWEST = -(2**31) + 0x7FFFFF


def lmo(
    score: Tensor,
    k: int | Tensor,
    *,
    group: int = 0,
    fixed: Tensor | None = None,
    positive: bool = False,
    check_nan: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Choose the vertex that keeps the k best scores of every row, by `select`."""
    check_budget(score.shape, k, group)
    # The maximum of a row with a NaN is NaN.
    if check_nan and score.numel() and score.amax(1).isnan().any():
        raise ValueError("score: contains NaN")
    out = torch.empty(score.shape, dtype=torch.bool, device=score.device) if out is None else out
    return select(score, k, group=group, fixed=fixed, positive=positive, out=out)


def round_mask(M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
    """Choose the mask of the k highest M of every row (or group). Ties go to the higher saliency.

    If exactly k entries of a row are at least 1/2, the row keeps these, and needs no search. After a penalty nearly all
    rows are of this kind. Their entries are nearly all 0 or 1, which numpy takes several times as long to partition.
    """
    check_budget(M.shape, k, group)
    shape, width = M.shape, group or M.shape[1]
    M, saliency = M.reshape(-1, width), saliency.reshape(-1, width)
    V = at_least(M, 0.5)
    count = V.view(torch.uint8).sum(1, dtype=torch.int32)
    k = k.to(M.device) if isinstance(k, Tensor) else k
    rest = (count != k).nonzero().squeeze(1)
    if len(rest):
        m, budget = M[rest], k[rest] if isinstance(k, Tensor) else k
        first = torch.empty(m.shape, dtype=torch.bool, device=m.device)
        select(m, budget, group=group, fixed=None, positive=False, out=first)
        lowest = m.add(as_float(~first), alpha=2).amin(1, keepdim=True)
        order = as_float(at_least(m, lowest)).sub_(as_float(at_least(lowest, m)))
        order.mul_(torch.finfo(torch.float32).max).add_(saliency[rest])
        V[rest] = select(order, budget, group=group, fixed=None, positive=False, out=first)
    return V.view(shape)


def select(score: Tensor, k: int | Tensor, *, group: int, fixed: Tensor | None, positive: bool, out: Tensor) -> Tensor:
    """Choose the vertex as `lmo` does, but without checks; write it to `out`, and return it."""
    rows, d = score.shape
    compiled, best = library(), level()
    fits = d <= LONGEST if not group else group <= 32 and d % group == 0
    suits = fits and score.device.type == "cpu" and score.dtype == torch.float32
    # C++ would read and write past the end of smaller tensors, and torch refuses them.
    suits &= all(x.shape == score.shape and x.dtype == torch.bool for x in (out, fixed) if x is not None)
    suits &= isinstance(k, int) or k.shape == (rows,)
    if suits and compiled and best is not None:
        V = out if out.stride(1) == 1 else torch.empty(out.shape, dtype=torch.bool)
        matrices = [x if x is None or x.stride(1) == 1 else x.contiguous() for x in (score, fixed, V)]
        budgets, each = (k.to("cpu", torch.int64).contiguous(), 0) if isinstance(k, Tensor) else (None, k)
        pointers = [x if x is None else x.data_ptr() for x in (*matrices, budgets)]
        strides = [0 if x is None else x.stride(0) for x in matrices]
        compiled.select_best(best, torch.get_num_threads(), *pointers, *strides, each, rows, d, group, positive)
        return V if V is out else out.copy_(V)
    if fixed is not None:
        score = torch.maximum(score, infinite(fixed))
    if not group:
        return _best_of_rows(score, k, positive, out)
    assert not isinstance(k, Tensor)
    return _best_of_groups(score, k, group, positive, out)


def _best_of_groups(score: Tensor, n: int, m: int, positive: bool, V: Tensor) -> Tensor:
    # Row i has the i-th members of all groups, since comparisons of whole rows run on vector instructions.
    S = torch.stack(score.reshape(-1, m).unbind(1))
    rank = torch.zeros(S.shape, dtype=torch.uint8, device=score.device)
    for i in range(m - 1):
        # Of two equal scores the first one is ahead.
        ahead = at_least(S[i], S[i + 1 :]).view(torch.uint8)
        rank[i + 1 :] += ahead
        rank[i] += (m - 1 - i) - ahead.sum(0, dtype=torch.uint8)
    best = ~at_least(rank, n)
    if positive:
        best &= at_least(S, SMALLEST_FLOAT)
    return V.copy_(torch.stack(best.unbind(0), 1).view(V.shape))


def _best_of_rows(score: Tensor, k: int | Tensor, positive: bool, V: Tensor) -> Tensor:
    if score.numel() == 0 or (isinstance(k, int) and k == 0):
        return V.zero_()
    k = k.to(score.device, torch.int64)[:, None] if isinstance(k, Tensor) else k
    threshold = _kth_largest(score, k)
    if positive:
        # If the k-th best score is not positive, all positive scores are kept.
        threshold.clamp_(min=SMALLEST_FLOAT)
    at_least(score, threshold, out=V)
    count = V.view(torch.uint8).sum(1, keepdim=True, dtype=torch.int32)
    surplus = (count > k).squeeze(1).nonzero().squeeze(1)
    if len(surplus):
        # In these rows more than k scores reach the threshold. Of the scores equal to it only the first are kept.
        scores, thresholds = score[surplus], threshold[surplus]
        above, tie = scores > thresholds, scores == thresholds
        ties_kept = (k[surplus] if isinstance(k, Tensor) else k) - above.sum(1, keepdim=True)
        V[surplus] = above | (tie & (tie.cumsum(1) <= ties_kept))
    return V


def _kth_largest(score: Tensor, k: int | Tensor) -> Tensor:
    """Find the k-th largest score of every row, (rows, 1); for k = 0 the largest. The caller then keeps no tie."""
    rows, d = score.shape
    if score.device.type != "cpu":
        if rows < FEW_ROWS:
            return kth_by_bits(score, k)
        if isinstance(k, Tensor):
            return score.sort(dim=1).values.gather(1, d - k.clamp(min=1))
        return score.kthvalue(d - k + 1, dim=1, keepdim=True).values
    # numpy has vector instructions: it takes a third of the time of torch's `kthvalue`, and a tenth of its `sort`.
    copy = score.clone()
    if isinstance(k, Tensor):
        copy.numpy().sort(axis=1)
        return copy.gather(1, d - k.clamp(min=1))
    copy.numpy().partition(d - k, axis=1)
    return copy[:, d - k : d - k + 1].clone()


def kth_by_bits(score: Tensor, k: int | Tensor) -> Tensor:
    """Find the k-th largest score of few long rows by counting, in 32 passes of the whole GPU without a wait.

    It is the highest value that k scores reach. Its bits are found one by one, from the highest bit on.
    """
    rows, d = score.shape
    needed = k.clamp(min=1) if isinstance(k, Tensor) else max(k, 1)
    found = torch.full((rows, 1), -(2**31), dtype=torch.int64, device=score.device)
    for bit in range(31, -1, -1):
        higher = found + 2**bit
        reached = (score >= _in_order(higher)).sum(1, keepdim=True)
        # A rank below LOWEST belongs to NaN. All scores reach it, but a comparison with NaN is false.
        reached = torch.where(higher < LOWEST, d, reached)
        found = torch.where(reached >= needed, higher, found)
    return _in_order(found)


def _in_order(number: Tensor) -> Tensor:
    """Return the fp32 value with this rank among all fp32 values, from -2^31 to 2^31 - 1; 0.0 has rank 0."""
    number = number.to(torch.int32)
    return (number ^ ((number >> 31) & 0x7FFFFFFF)).view(torch.float32)
