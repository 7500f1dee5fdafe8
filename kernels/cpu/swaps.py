"""Make 1-swaps in plain torch, for `--kernel torch`. For formulas see `kernels/swaps.py`."""

import torch
from torch import Tensor

from ..definitions import LEAST_GAIN
from ..masks import infinite, masked


def row_swaps(
    W: Tensor, G: Tensor, R: Tensor, V: Tensor, limit: int, *, group: int = 0, fixed: Tensor | None = None
) -> None:
    """Lower the error of every row's mask by 1-swaps, in place."""
    W = W.float()
    blocks = _diagonal_blocks(G, group or G.shape[1])
    q = W * W * G.diagonal()
    threshold = masked(q, ~V).sum(1).mul_(-LEAST_GAIN)
    rows, r, v = torch.arange(len(W), device=W.device), R.clone(), V.clone()
    fixed_rows = V.new_zeros(()) if fixed is None else fixed
    for _ in range(limit):
        lin = (2 * W).mul_(r)
        a, b = torch.maximum(q + lin, infinite(~v | fixed_rows)), torch.maximum(q - lin, infinite(v))
        i, p, change = _best_swap(W, a, b, blocks)
        active = change < threshold
        if not active.all():
            # Rows without a swap leave the search.
            R[rows], V[rows] = r, v
            W, q, threshold, rows, r, v, i, p = (x[active] for x in (W, q, threshold, rows, r, v, i, p))
            fixed_rows = fixed_rows if fixed is None else fixed_rows[active]
        if not len(rows):
            return
        at = torch.arange(len(rows), device=W.device)
        v[at, i], v[at, p] = False, True
        r += G[i] * W[at, i, None] - G[p] * W[at, p, None]
    R[rows], V[rows] = r, v


def _diagonal_blocks(G: Tensor, m: int) -> Tensor:
    """Return the diagonal blocks of G for groups of m columns, (d / m, m, m)."""
    groups = len(G) // m if m else 1
    return G.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _best_swap(W: Tensor, a: Tensor, b: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best swap of every row: the entries i to remove and p to keep, and the change of the error.

    Args:
        W: (rows, d) fp32.
        a, b: (rows, d), the change of the error if one entry is removed (a) or kept (b); inf where impossible.
        blocks: from `_diagonal_blocks`.
    """
    groups, m, _ = blocks.shape
    shape = (len(W), groups, m)
    w, a, b = W.view(shape), a.view(shape), b.view(shape)
    group = torch.arange(groups, device=W.device)

    def partners(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Find the lowest x of every group and its best partner in y, and then the best of these pairs.
        first = x.argmin(2, keepdim=True)
        pairs = blocks[group, first.squeeze(2)].mul_(w).mul_(2 * w.gather(2, first))
        change, second = (y - pairs).min(2, keepdim=True)
        change += x.gather(2, first)
        change, best = change.min(1, keepdim=True)
        first, second = ((z.gather(1, best) + m * best).view(-1) for z in (first, second))
        return first, second, change.view(-1)

    # The best pair with the lowest a of a group, and the best pair with the lowest b of a group.
    i, p, change = partners(a, b)
    p_b, i_b, change_b = partners(b, a)
    better = change_b < change
    return torch.where(better, i_b, i), torch.where(better, p_b, p), torch.minimum(change, change_b)
