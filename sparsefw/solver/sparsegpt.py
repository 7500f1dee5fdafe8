"""SparseGPT: mask and weights of one layer in one sweep over its inputs (Frantar & Alistarh 2023, arXiv 2301.00774).

    minimise ||(W - Z) X||_F^2 = sum((W - Z) * ((W - Z) G)),  G = X X^T,  Z = 0 where the mask is False

Columns are decided from left to right. The upper Cholesky factor C of the inverse, G^-1 = C^T C, gives the cost of
removing W_ij once the columns before j are settled, and the best update of the weights behind it:

    cost   = W_ij^2 / C_jj^2
    update   W_i,j: -= W_ij / C_jj * C_j,j:
"""

import torch
from torch import Tensor

from sparsefw.kernels import cpu
from sparsefw.solver import patterns
from sparsefw.solver.patterns import Pattern


def prune(
    W: Tensor,
    G: Tensor,
    pattern: Pattern,
    *,
    support: Tensor | None = None,
    damp: float = 0.01,
    blocksize: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune one layer and update its kept weights.

    As published: the mask of a block of columns is chosen once, when the sweep reaches the block, under one budget over
    all its rows, so the scopes `row` and `layer` are the same here and rows differ in what they keep. Under n:m every
    group is chosen when the sweep reaches it, and a block is the largest multiple of m that fits (at least one group).
    Unlike the published code, ties never prune more: the blocks' budgets add up to the layer's exactly.

    Args:
        W: (rows, d) weight, fp32 / bf16 / fp16.
        G: (d, d) fp32 Gram matrix. Inputs whose diagonal entry is 0 are dead: their weights become 0.
        pattern: what is kept; d is a multiple of its group.
        support: (rows, d) bool, weights that may be nonzero; None: all.
        damp: addition to the diagonal of G, as a fraction of its mean.
        blocksize: columns of a block.

    Returns:
        mask (rows, d) bool, True keeps a weight, and Z (rows, d) fp32, the weights, exactly 0 outside the mask. If
        numbers overflow on the way, Z is not finite.

    Raises:
        FloatingPointError: NaN or Inf in W or G, or G is not positive definite.
    """
    if not (W.isfinite().all() and G.isfinite().all()):
        raise FloatingPointError("NaN or Inf in the layer's weight or Gram matrix")
    rows, d = W.shape
    group = pattern.group
    width = max(group, blocksize // group * group) if group else blocksize
    C = inverse_factor(G, damp)
    # A copy: the sweep works in place.
    Z = W.float().masked_fill(G.diagonal() == 0, 0)
    mask = torch.empty_like(Z, dtype=torch.bool)
    for start in range(0, d, width):
        end = min(start + width, d)
        chosen, factor = mask[:, start:end], C[start:end, start:end]
        allowed = None if support is None else support[:, start:end]
        if not group:
            # The difference of two totals, so that the roundings of the blocks do not add up.
            budget = patterns.kept_in_layer(pattern, rows, end) - patterns.kept_in_layer(pattern, rows, start)
            cost = _cost(Z[:, start:end], factor, allowed)
            chosen.copy_(_allowed(cpu.lmo(cost.view(1, -1), budget, checked=False).view(cost.shape), allowed))
        errors = _sweep(Z[:, start:end], chosen, factor, pattern, allowed)
        Z[:, end:].addmm_(errors, C[start:end, end:], alpha=-1)
    return mask, Z


def inverse_factor(G: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor C of the damped inverse, C^T C = (G + damp mean(diag G) I)^-1, (d, d) fp32.

    With rows and columns reversed, the lower factor of a matrix is an upper one: G = P P^T, hence C = P^-1. This takes
    one decomposition; the published code decomposes, inverts and decomposes again.

    Args:
        G: (d, d) fp32; a diagonal entry of 0 counts as 1.
        damp: addition to the diagonal, as a fraction of its mean.

    Raises:
        FloatingPointError: the damped matrix is not positive definite.
    """
    backwards = G.flip((0, 1))
    diagonal = backwards.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(backwards)
    if failed:
        raise FloatingPointError(f"the Gram matrix is not positive definite, even with a damping of {damp}")
    del backwards, diagonal
    identity = torch.eye(len(G), dtype=G.dtype, device=G.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    # No more than three matrices of this size at once, beside G.
    del lower, identity
    return inverse.flip((0, 1))


def _sweep(Z: Tensor, mask: Tensor, factor: Tensor, pattern: Pattern, allowed: Tensor | None) -> Tensor:
    """Settle the columns of one block, in place.

    Args:
        Z: (rows, width) fp32; zeroed outside the mask, updated inside.
        mask: (rows, width) bool; given, or under n:m chosen here.
        factor: (width, width) fp32, the block's part of the Cholesky factor.
        pattern: what is kept.
        allowed: (rows, width) bool, weights that may be nonzero; None: all.

    Returns:
        errors (rows, width) fp32: the removed weights of each column over C_jj; the columns behind the block move by
        -errors C.
    """
    errors = torch.empty_like(Z)
    group = pattern.group
    for j in range(Z.shape[1]):
        if group and j % group == 0:
            columns = slice(j, j + group)
            allowed_here = None if allowed is None else allowed[:, columns]
            cost = _cost(Z[:, columns], factor[columns, columns], allowed_here)
            chosen = cpu.lmo(cost, patterns.kept_in_group(pattern), group=group, checked=False)
            mask[:, columns] = _allowed(chosen, allowed_here)
        errors[:, j] = Z[:, j].masked_fill(mask[:, j], 0) / factor[j, j]
        Z[:, j].masked_fill_(~mask[:, j], 0)
        Z[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
    return errors


def _cost(Z: Tensor, factor: Tensor, allowed: Tensor | None) -> Tensor:
    """The square root of the cost of each removal, which has the same order and does not overflow."""
    cost = (Z / factor.diagonal()).abs_()
    # Weights that must stay zero are removed first.
    return cost if allowed is None else cost.masked_fill_(~allowed, -1)


def _allowed(mask: Tensor, allowed: Tensor | None) -> Tensor:
    return mask if allowed is None else mask & allowed
