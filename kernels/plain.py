"""Operations in plain torch for both kernels. Each passes over its matrices once, a few times in a solve.

They work in blocks of rows, so that temporaries stay in the cache and take little memory. On a CPU the results are the
same for any size of the blocks. Given float64, the operations compute in float64. None of them changes its arguments,
except for `out`.
"""

import torch
from torch import Tensor

from .definitions import widened
from .masks import choose, masked

# Number of entries of a matrix on which a thread of a CPU works at a time, and a GPU. For temporaries of a whole large
# matrix the system would allocate and clear memory, at several times the cost of the arithmetic. Smaller blocks need
# more calls, in which threads wait for each other. Larger blocks were not measured. On a GPU a temporary of a block has
# 16 MiB, of which the cache of an H100 holds two. No GPU has confirmed this size.
BLOCK, GPU_BLOCK = 1 << 19, 1 << 22


def row_blocks(X: Tensor) -> list[slice]:
    """Cut X (rows, d) into slices of rows: BLOCK entries for each CPU thread on a CPU, GPU_BLOCK entries on a GPU."""
    rows, d = X.shape
    entries = BLOCK * torch.get_num_threads() if X.device.type == "cpu" else GPU_BLOCK
    height = max(1, entries // max(d, 1))
    return [slice(start, start + height) for start in range(0, rows, height)]


def removed(W: Tensor, mask: Tensor, target_gap: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Compute target_gap + W * (1 - mask): the weights that a mask removes, plus the target gap, rounded once.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        mask: (rows, d) bool, True keeps a weight.
        target_gap: (rows, d) fp32, target minus W; None counts as 0.
        out: (rows, d), fp32 / bf16 / fp16, written and returned. None: a new matrix, in fp32 with a target gap, in the
            dtype of W without.
    """
    out = torch.empty_like(W if target_gap is None else target_gap) if out is None else out
    zero = W.new_zeros(())
    for rows in row_blocks(W):
        E = choose(mask[rows], zero, W[rows])
        if target_gap is None:
            out[rows] = E
        else:
            torch.add(E, target_gap[rows], out=out[rows])
    return out


def begin_fit(W: Tensor, start: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Compute Z = mask * start, and E = W - Z.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        start: (rows, d), fp32 / bf16 / fp16; values outside the mask do not matter, not even NaN.
        mask: (rows, d) bool, True keeps a weight.
        dtype: dtype of E.

    Returns:
        Z (rows, d) fp32, and E (rows, d).
    """
    # No blocks: the results are the only large tensors.
    Z = widened(masked(start, mask))
    return Z, torch.sub(W, Z, out=torch.empty_like(W, dtype=dtype))


def row_errors(W: Tensor, R: Tensor, Z: Tensor | None = None) -> Tensor:
    """Compute sum((W - Z) * R) of every row, (rows,) fp32. If R is (W - Z) G, this is the error of Z.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        R: (rows, d) fp32.
        Z: (rows, d) fp32; None counts as 0.
    """
    errors = R.new_empty(len(R))
    for rows in row_blocks(R):
        terms = W[rows] * R[rows] if Z is None else torch.sub(W[rows], Z[rows]).mul_(R[rows])
        torch.sum(terms, 1, out=errors[rows])
    return errors


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
    """Compute candidate weights after a refit, and the scores by which the mask is chosen again.

        candidate = Z at kept weights and outside the support,  Z + R inverse at the other removed weights
        score     = |candidate| root (1 + margin mask)

    The candidate of a removed weight is its value after an exact step along its coordinate. |candidate| root is the
    square root of the error of removing this weight alone.

    Args:
        Z: (rows, d) fp32, refitted weights, 0 outside the mask.
        R: (rows, d) fp32, (W - Z) G.
        mask: (rows, d) bool, True keeps a weight.
        inverse: (d,) fp32, 1 / diag(G).
        root: (d,) fp32, the square roots of diag(G).
        margin: (rows,) fp32, share by which the score of a removed weight must exceed the score of a kept weight to
            replace it; None counts as 0.
        support: (rows, d) bool, True where a weight may be nonzero; None: everywhere.

    Returns:
        Candidates and scores, (rows, d) fp32 each.
    """
    # Two allocations, since the caller frees the scores long before the candidates.
    candidate, score = torch.empty_like(Z), torch.empty_like(Z)
    one = root.new_ones(())
    for rows in row_blocks(Z):
        z, kept = Z[rows], mask[rows]
        stays = kept if support is None else kept | ~support[rows]
        choose(stays, z, torch.addcmul(z, R[rows], inverse), out=candidate[rows])
        torch.abs(candidate[rows], out=score[rows]).mul_(root)
        if margin is not None:
            score[rows] *= choose(kept, 1 + margin[rows, None], one)
    return candidate, score


def bound_scores(
    W: Tensor, R: Tensor, M: Tensor, *, target_gap: Tensor | None = None, damping: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the scores by which `lmo` chooses the vertex of the lower bound, and the constant term of the bound.

        r        = R - (target_gap + W * (1 - M)) damping
        score    = W r
        constant = sum(target_gap * r)

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        R: (rows, d) fp32, (target_gap + W * (1 - M)) (G + damping).
        M: (rows, d) fp32, the relaxed mask.
        target_gap: (rows, d) fp32, target minus W; None counts as 0.
        damping: (d,) fp32, values that were added to the diagonal of G; None counts as 0.

    Returns:
        score (rows, d) fp32, half of the negative gradient of the error; and constant (rows,) fp32.
    """
    score, constant = torch.empty_like(R), R.new_zeros(len(R))
    for rows in row_blocks(R):
        w, r, gap = W[rows], R[rows], None if target_gap is None else target_gap[rows]
        if damping is not None:
            E = (1 - M[rows]).mul_(w)
            E = E if gap is None else E.add_(gap)
            r = torch.sub(r, E.mul_(damping), out=E)
        torch.mul(w, r, out=score[rows])
        if gap is not None:
            torch.sum(gap * r, 1, out=constant[rows])
    return score, constant


def bound_sums(score: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """Compute sum(score * (1 + M - 2 V)) of every row, (rows,) fp32: the lower bound without its constant term.

    Args:
        score: (rows, d) fp32, from `bound_scores`.
        M: (rows, d) fp32, the relaxed mask.
        V: (rows, d) bool, the vertex that `lmo` chose by `score`.
    """
    sums, minus_two, zero = score.new_empty(len(score)), score.new_full((), -2), score.new_zeros(())
    for rows in row_blocks(score):
        terms = choose(V[rows], minus_two, zero).add_(M[rows]).add_(1).mul_(score[rows])
        torch.sum(terms, 1, out=sums[rows])
    return sums


def lowest(X: Tensor, kept: Tensor) -> Tensor:
    """Find the lowest X among the kept entries of every row, (rows,) fp32; inf where a row keeps none.

    Args:
        X: (rows, d) fp32.
        kept: (rows, d) bool.
    """
    low, infinity = X.new_empty(len(X)), X.new_full((), torch.inf)
    for rows in row_blocks(X):
        torch.amin(choose(kept[rows], X[rows], infinity), 1, out=low[rows])
    return low
