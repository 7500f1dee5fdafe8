"""The specification, continued: what refits, rounds of re-selection and errors do besides products and steps.

As in naive.py, every operation is plain torch, formula by formula, and computes in float64 if the inputs are. Tests
hold cpu.py and triton_ops.py against it.
"""

import torch
from torch import Tensor

from .naive import lmo, widened

# Conjugate gradients stop in a row once <r, z> is at most this fraction of its first value: the ratios that follow are
# made of rounding errors.
CONVERGED = 1e-12


def removed(W: Tensor, mask: Tensor, target_gap: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """E = target_gap + W * (1 - mask), the weights that a mask removes, as the left operand of a product.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        mask: (rows, d) bool, True keeps a weight.
        target_gap: (rows, d) fp32, the target minus W; None adds nothing.
        out: (rows, d), fp32 / bf16 / fp16, written and returned. When None it is allocated, in the dtype of W, or with
            a target gap in fp32.
    """
    E = W.masked_fill(mask, 0)
    E = E if target_gap is None else target_gap + E
    return E if out is None else out.copy_(E)


def begin_fit(W: Tensor, start: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The start of a refit: Z = mask * start, and E = W - Z, the left operand of the product that gives the residual.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        start: (rows, d), fp32 / bf16 / fp16; entries outside the mask are not read.
        mask: (rows, d) bool.
        dtype: the dtype of E, fp32 or bf16.

    Returns:
        Z (rows, d) fp32, and E (rows, d).
    """
    Z = widened(start).masked_fill(~mask, 0)
    E = widened(W) - Z
    return Z, E if E.dtype == torch.float64 else E.to(dtype)


def row_errors(W: Tensor, R: Tensor, Z: Tensor | None = None) -> Tensor:
    """sum((W - Z) * R) of every row, (rows,) fp32: the error of weights Z that approximate W, if R = (W - Z) G.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        R: (rows, d) fp32.
        Z: (rows, d), fp32 / bf16 / fp16; None subtracts nothing.
    """
    E = widened(W) if Z is None else widened(W) - widened(Z)
    return (E * R).sum(1)


def take_rows(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """X[taken] = Y[taken], in place.

    Args:
        X, Y: (rows, d), of one dtype.
        taken: (rows,) bool.
    """
    X[taken] = Y[taken]


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
    """Weights among which a refitted mask is chosen again, and the scores of the choice.

        T     = Z at kept weights and outside the support,  Z + R inverse at the other removed weights
        score = |T| root (1 + margin mask)

    A removed weight stands where an exact step along its own coordinate puts it. |T| root is the square root of the
    error of removing that weight alone.

    Args:
        Z: (rows, d) fp32, refitted weights, 0 outside the mask.
        R: (rows, d) fp32, (W - Z) G.
        mask: (rows, d) bool, the weights that are kept.
        inverse: (d,) fp32, 1 / diag(G).
        root: (d,) fp32, the square roots of diag(G).
        margin: (rows,) fp32, by which a removed weight has to be better than a kept one; None: 0.
        support: (rows, d) bool, weights that may be nonzero; None: all.

    Returns:
        T and score, (rows, d) fp32 each.
    """
    removed = ~mask if support is None else ~mask & support
    T = Z + (R * inverse).masked_fill(~removed, 0)
    score = T.abs() * root
    return T, score if margin is None else score * (1 + margin[:, None] * mask)


def bound_scores(
    W: Tensor, R: Tensor, M: Tensor, *, target_gap: Tensor | None = None, damping: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Half of the negative gradient of the error without penalty, and the part of the lower bound that it lacks.

        r        = R - (target_gap + W * (1 - M)) damping
        score    = W r
        constant = sum(target_gap * r)

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        R: (rows, d) fp32, (target_gap + W * (1 - M)) G, on G with `damping` added to its diagonal.
        M: (rows, d) fp32, the relaxed mask.
        target_gap: (rows, d) fp32, the target minus W; None if they are the same.
        damping: (d,) fp32; None: 0.

    Returns:
        score (rows, d) fp32, and constant (rows,) fp32.
    """
    w, r = widened(W), R
    if damping is not None:
        E = w * (1 - M)
        r = R - (E if target_gap is None else target_gap + E) * damping
    return w * r, r.new_zeros(len(r)) if target_gap is None else (target_gap * r).sum(1)


def bound_sums(score: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """sum(score * (1 + M - 2 V)) of every row, (rows,) fp32: error(M) - <gradient, M - V>, without the target gap.

    Args:
        score: (rows, d) fp32, from `bound_scores`.
        M: (rows, d) fp32, the relaxed mask.
        V: (rows, d) bool, the vertex of the score.
    """
    return (score * (1 + M - 2 * V.to(M.dtype))).sum(1)


def round_mask(M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
    """The binary mask of the k highest M of every row (or group), (rows, d) bool.

    Exactly k entries are kept. Ties go to the higher saliency, then to the lower index.

    Args:
        M: (rows, d) fp32, the relaxed mask.
        saliency: (rows, d) fp32, at least 0.
        k, group: as in `naive.lmo`.
    """
    units = (-1, group or M.shape[1])
    first = lmo(M, k, group=group)
    # The lowest M that got in. Entries above it are kept; saliency decides among those equal to it.
    lowest = M.masked_fill(~first, torch.inf).view(units).amin(1, keepdim=True)
    order = torch.sign(M.view(units) - lowest).view(M.shape)
    return lmo(order * torch.finfo(torch.float32).max + saliency, k, group=group)


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
    """One step of preconditioned conjugate gradients of every row, in place: the move along P, and the next P.

        a  = rz / <P, U>                             0 where a row is done, rz <= enough
        Z += a P                                     R -= a U
        r  = mask * R     z = r inverse              rz' = <r, z>
        P  = z + (rz' / rz) P

    A ratio whose denominator is not positive is 0: nothing is left to gain in that row.

    Args:
        Z: (rows, d) fp32, the iterate.
        R: (rows, d) fp32, its residual, B - Z G.
        P: (rows, d), fp32 or the dtype of the product's operand, the direction; replaced by the next one.
        U: (rows, d) fp32, the product P G.
        rz: (rows,) fp32, <r, z> of the direction; replaced.
        enough: (rows,) fp32, the <r, z> at which a row is done.
        inverse: (d,) fp32, the preconditioner: 1 / diag(G).
        mask: (rows, d) bool, the entries that move; None moves all.
        first: before the first move. P, rz and enough are only written, Z and R stay, U is not read.
        last: after the last product. Z and R move; P, rz and enough stay.
    """
    p, before = P.to(Z.dtype), rz.clone()
    if not first:
        a = ratio(before, (p * U).sum(1)).masked_fill(before <= enough, 0)[:, None]
        Z += a * p
        R -= a * U
    if last:
        return
    r = R if mask is None else R.masked_fill(~mask, 0)
    z = r * inverse
    rz.copy_((r * z).sum(1))
    if first:
        P.copy_(z)
        enough.copy_(CONVERGED * rz)
    else:
        P.copy_(z + ratio(rz, before)[:, None] * p)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, 0)
