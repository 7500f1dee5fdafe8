"""Selection in plain torch: the k best of every row or group, for cpu.py.

Exactly k entries are kept, and equal scores go to the lower index. A row is partitioned, not sorted.

On a CPU torch has vector instructions for arithmetic, but not for operations that mix bool and floating tensors:
`masked_fill`, comparisons, and products with a bool tensor take 5 to 40 times as long as a product. The functions here
compute with the bytes of bool tensors instead, and let numpy compare.
"""

import numpy as np
import torch
from torch import Tensor

# Entries of a matrix that each CPU thread works on at a time. Temporaries of a block stay in the cache. For those of a
# whole large matrix the system would hand out and clear memory, at several times the cost of the arithmetic. Smaller
# blocks need more calls, in which threads wait for each other. Larger blocks were not measured.
BLOCK = 524288

# The smallest float above 0.
SMALLEST_FLOAT = 2.0**-149

# A GPU selects from each row in one program. With fewer rows than this most of it would wait: a matrix with one budget
# is a single row of all its entries.
FEW_ROWS = 16

# -inf as a number of `_in_order`. Numbers below it stand for NaN.
LOWEST = -(2**31) + 0x7FFFFF


def row_blocks(X: Tensor) -> list[slice]:
    """Slices of rows of X (rows, d) to work on at a time: BLOCK entries for each CPU thread; one slice on a GPU."""
    rows, d = X.shape
    height = max(1, BLOCK * torch.get_num_threads() // max(d, 1)) if X.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + height) for start in range(0, rows, height)]


def as_float(kept: Tensor) -> Tensor:
    """0 and 1 of a bool matrix, fp32."""
    return kept.view(torch.uint8).float()


def masked(X: Tensor, kept: Tensor) -> Tensor:
    """X where `kept` is True, else 0; (rows, d) in the dtype of X."""
    if X.device.type != "cpu":
        return torch.where(kept, X, 0)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[X.dtype.itemsize]
    # -1 has all bits set, 0 none.
    return kept.view(torch.int8).neg().to(bits).bitwise_and_(X.view(bits)).view(X.dtype)


def infinite(chosen: Tensor) -> Tensor:
    """inf where `chosen` is True, else -inf, fp32: maximum(X, infinite(chosen)) is X with inf at the chosen entries."""
    return as_float(chosen).sub_(0.5).mul_(torch.inf)


def at_least(X: Tensor, Y: Tensor | float, out: Tensor | None = None) -> Tensor:
    """X >= Y, bool, written to `out` and returned; allocated when None."""
    if X.device.type != "cpu":
        return torch.ge(X, Y, out=out)
    other = Y.numpy() if isinstance(Y, Tensor) else Y
    return torch.from_numpy(np.greater_equal(X.numpy(), other, out=None if out is None else out.numpy()))


def select(score: Tensor, k: int | Tensor, *, group: int, fixed: Tensor | None, positive: bool, out: Tensor) -> Tensor:
    """`lmo` without its checks; written to `out` and returned."""
    if fixed is not None:
        score = torch.maximum(score, infinite(fixed))
    if not group:
        return _best_of_rows(score, k, positive, out)
    assert not isinstance(k, Tensor)
    return _best_of_groups(score, k, group, positive, out)


def _best_of_groups(score: Tensor, n: int, m: int, positive: bool, V: Tensor) -> Tensor:
    # Row i has the i-th members of all groups: comparisons of whole rows run on vector instructions.
    S = torch.stack(score.reshape(-1, m).unbind(1))
    rank = torch.zeros(S.shape, dtype=torch.uint8, device=score.device)
    for i in range(m - 1):
        # The first of two equal scores is ahead.
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
        # If the k-th best is not positive, the positive scores are kept.
        threshold.clamp_(min=SMALLEST_FLOAT)
    at_least(score, threshold, out=V)
    count = V.view(torch.uint8).sum(1, keepdim=True, dtype=torch.int32)
    surplus = (count > k).squeeze(1).nonzero().squeeze(1)
    if len(surplus):
        # More than k scores reach the threshold: of the scores equal to it only the first ones are kept.
        S, T = score[surplus], threshold[surplus]
        above, tie = S > T, S == T
        ties_kept = (k[surplus] if isinstance(k, Tensor) else k) - above.sum(1, keepdim=True)
        V[surplus] = above | (tie & (tie.cumsum(1) <= ties_kept))
    return V


def _kth_largest(score: Tensor, k: int | Tensor) -> Tensor:
    """The k-th largest score of every row, (rows, 1). Where k = 0 it is the largest, left out as a tie."""
    rows, d = score.shape
    if score.device.type != "cpu":
        if rows < FEW_ROWS:
            return kth_by_bits(score, k)
        if isinstance(k, Tensor):
            return score.sort(dim=1).values.gather(1, d - k.clamp(min=1))
        return score.kthvalue(d - k + 1, dim=1, keepdim=True).values
    # numpy's vector instructions take a third of the time of torch's `kthvalue`, and a tenth of its `sort`.
    copy = score.clone()
    if isinstance(k, Tensor):
        copy.numpy().sort(axis=1)
        return copy.gather(1, d - k.clamp(min=1))
    copy.numpy().partition(d - k, axis=1)
    return copy[:, d - k : d - k + 1].clone()


def kth_by_bits(score: Tensor, k: int | Tensor) -> Tensor:
    """`_kth_largest` of a few long rows, by counting: 32 passes over the matrix, each of the whole GPU, no wait.

    The highest number that k scores reach is found bit by bit, the highest bit first.
    """
    rows, d = score.shape
    least = k.clamp(min=1) if isinstance(k, Tensor) else max(k, 1)
    found = torch.full((rows, 1), -(2**31), dtype=torch.int64, device=score.device)
    for bit in range(31, -1, -1):
        higher = found + 2**bit
        reached = (score >= _in_order(higher)).sum(1, keepdim=True)
        # Comparisons with NaN are false, and all scores reach what is below -inf.
        reached = torch.where(higher < LOWEST, d, reached)
        found = torch.where(reached >= least, higher, found)
    return _in_order(found)


def _in_order(number: Tensor) -> Tensor:
    """The fp32 number at each place of the order of all of them, from -2^31 to 2^31 - 1; 0.0 is at 0."""
    number = number.to(torch.int32)
    return (number ^ ((number >> 31) & 0x7FFFFFFF)).view(torch.float32)
