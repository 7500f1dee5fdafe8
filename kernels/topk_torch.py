"""The k best of every row, or of every group, in plain torch: how reference.py selects.

Exactly k are kept, and equal scores go to the lower index. A selection takes a partition of each row, not a sort.

On a CPU torch has vector instructions for arithmetic, but none where bool and floating tensors meet: `masked_fill`,
comparisons, and products with a mask take 5 to 40 times as long as a product. So here a mask is used through its bytes,
and numpy compares.
"""

import numpy as np
import torch
from torch import Tensor

# Entries of a matrix that each of a CPU's threads works on at a time. What is computed on the way stays in the cache;
# of a large matrix every new tensor would be memory that the system hands out and clears, at several times the cost of
# the arithmetic. Smaller blocks pay for more calls, and threads that call wait for each other: measured up to here.
BLOCK = 524288

# The least number above 0.
LEAST = 2.0**-149


def row_blocks(X: Tensor) -> list[slice]:
    """Rows of X (rows, d) to work on at a time: BLOCK entries for each of a CPU's threads, elsewhere all."""
    rows, d = X.shape
    height = max(1, BLOCK * torch.get_num_threads() // max(d, 1)) if X.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + height) for start in range(0, rows, height)]


def as_float(mask: Tensor) -> Tensor:
    """0 and 1 of a bool mask, fp32."""
    return mask.view(torch.uint8).float()


def keep(X: Tensor, mask: Tensor) -> Tensor:
    """X where the mask is True, else 0; (rows, d) in the dtype of X."""
    if X.device.type != "cpu":
        return torch.where(mask, X, 0)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[X.dtype.itemsize]
    # -1 has every bit, and 0 none.
    return mask.view(torch.int8).neg().to(bits).bitwise_and_(X.view(bits)).view(X.dtype)


def infinite(mask: Tensor) -> Tensor:
    """inf where the mask is True, else -inf, fp32: the larger of this and X is X but for the mask."""
    return as_float(mask).sub_(0.5).mul_(torch.inf)


def at_least(X: Tensor, Y: Tensor | float, out: Tensor | None = None) -> Tensor:
    """X >= Y, bool, written to `out` and returned; allocated when None."""
    if X.device.type != "cpu":
        return torch.ge(X, Y, out=out)
    Y = Y.numpy() if isinstance(Y, Tensor) else Y
    return torch.from_numpy(np.greater_equal(X.numpy(), Y, out=None if out is None else out.numpy()))


def select(score: Tensor, k: int | Tensor, *, group: int, fixed: Tensor | None, positive: bool, out: Tensor) -> Tensor:
    """The selection that `reference.lmo` specifies, without its checks; written to `out` and returned."""
    if fixed is not None:
        score = torch.maximum(score, infinite(fixed))
    return _best_of_groups(score, k, group, positive, out) if group else _best_of_rows(score, k, positive, out)


def _best_of_groups(score: Tensor, n: int, m: int, positive: bool, V: Tensor) -> Tensor:
    # Members of a group side by side in rows: comparisons of neighbours in memory run on vector instructions.
    S = torch.stack(score.reshape(-1, m).unbind(1))
    rank = torch.zeros(S.shape, dtype=torch.uint8, device=score.device)
    for i in range(m - 1):
        # Of two that are equal the first wins.
        ahead = at_least(S[i], S[i + 1 :]).view(torch.uint8)
        rank[i + 1 :] += ahead
        rank[i] += (m - 1 - i) - ahead.sum(0, dtype=torch.uint8)
    best = ~at_least(rank, n)
    if positive:
        best &= at_least(S, LEAST)
    return V.copy_(torch.stack(best.unbind(0), 1).view(V.shape))


def _best_of_rows(score: Tensor, k: int | Tensor, positive: bool, V: Tensor) -> Tensor:
    if score.numel() == 0 or (isinstance(k, int) and k == 0):
        return V.zero_()
    k = k.to(score.device, torch.int64)[:, None] if isinstance(k, Tensor) else k
    threshold = _kth_largest(score, k)
    if positive:
        # Where the k-th best is no gain, all that are.
        threshold.clamp_(min=LEAST)
    at_least(score, threshold, out=V)
    count = V.view(torch.uint8).sum(1, keepdim=True, dtype=torch.int32)
    surplus = (count > k).squeeze(1).nonzero().squeeze(1)
    if len(surplus):
        # More than k reach the threshold: of those equal to it only the first few are kept.
        S, T = score[surplus], threshold[surplus]
        above, tie = S > T, S == T
        room = (k[surplus] if isinstance(k, Tensor) else k) - above.sum(1, keepdim=True)
        V[surplus] = above | (tie & (tie.cumsum(1) <= room))
    return V


def _kth_largest(score: Tensor, k: int | Tensor) -> Tensor:
    """Of every row, (rows, 1); where k (rows, 1) is 0 the largest, which is a surplus there."""
    d = score.shape[1]
    if score.device.type != "cpu":
        if isinstance(k, Tensor):
            return score.sort(dim=1).values.gather(1, d - k.clamp(min=1))
        return score.kthvalue(d - k + 1, dim=1, keepdim=True).values
    # numpy's vector instructions take a third of the time of torch's `kthvalue` and a tenth of that of its `sort`.
    copy = score.clone()
    if isinstance(k, Tensor):
        copy.numpy().sort(axis=1)
        return copy.gather(1, d - k.clamp(min=1))
    copy.numpy().partition(d - k, axis=1)
    return copy[:, d - k : d - k + 1].clone()
