"""Select the k best scores of every row or group in plain torch, for `cpu.py`.

Exactly k entries are kept (with `positive` fewer, if fewer scores are above 0), and equal scores go to the lower index.

On a CPU torch has vector instructions for arithmetic, but not for operations that mix bool and floating tensors:
`masked_fill`, comparisons, and products with a bool tensor take 5 to 40 times as long as a product of floating tensors.
So these functions compute with the bytes of bool tensors, and compare in numpy.
"""

import numpy as np
import torch
from torch import Tensor

# Number of entries of a matrix on which a CPU thread works at a time. Temporaries of such a block stay in the cache.
# For temporaries of a whole large matrix the system would allocate and clear memory, at several times the cost of the
# arithmetic. Smaller blocks need more calls, in which threads wait for each other. Larger blocks were not measured.
BLOCK = 524288

# The smallest float above 0.
SMALLEST_FLOAT = 2.0**-149

# On a GPU one program selects from a row. With fewer rows than this most of the GPU would be idle. With `layer:0.6`,
# for example, all entries of a matrix are one row.
FEW_ROWS = 16

# Rank of -inf in `_in_order`. Lower ranks belong to NaN.
LOWEST = -(2**31) + 0x7FFFFF


def row_blocks(X: Tensor) -> list[slice]:
    """Cut X (rows, d) into slices of rows: BLOCK entries for each CPU thread on a CPU, one slice on a GPU."""
    rows, d = X.shape
    height = max(1, BLOCK * torch.get_num_threads() // max(d, 1)) if X.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + height) for start in range(0, rows, height)]


def as_float(kept: Tensor) -> Tensor:
    """Convert a bool matrix to fp32, with 1 for True and 0 for False."""
    return kept.view(torch.uint8).float()


def masked(X: Tensor, kept: Tensor) -> Tensor:
    """Set X to 0 where `kept` is False; returns (rows, d) in the dtype of X."""
    if X.device.type != "cpu":
        return torch.where(kept, X, 0)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[X.dtype.itemsize]
    # All bits of -1 are set, and no bit of 0 is set.
    return kept.view(torch.int8).neg().to(bits).bitwise_and_(X.view(bits)).view(X.dtype)


def infinite(chosen: Tensor) -> Tensor:
    """Return inf where `chosen` is True, else -inf, fp32. Its maximum with X is X with inf at the chosen entries."""
    return as_float(chosen).sub_(0.5).mul_(torch.inf)


def at_least(X: Tensor, Y: Tensor | float, out: Tensor | None = None) -> Tensor:
    """Compute X >= Y, bool, in `out` or a new tensor."""
    if X.device.type != "cpu":
        return torch.ge(X, Y, out=out)
    other = Y.numpy() if isinstance(Y, Tensor) else Y
    return torch.from_numpy(np.greater_equal(X.numpy(), other, out=None if out is None else out.numpy()))


def select(score: Tensor, k: int | Tensor, *, group: int, fixed: Tensor | None, positive: bool, out: Tensor) -> Tensor:
    """Choose the vertex as `lmo` does, but without checks; write it to `out`, and return it."""
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
