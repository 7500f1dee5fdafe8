"""Choose masks by the methods of the table, and weights if a method changes them.

Saliencies say how much a weight matters by itself. They are methods of their own, choose the warm start and the fixed
entries of Frank-Wolfe, and break its ties. SparseGPT decides mask and weights of one layer in one sweep over its inputs
(Frantar & Alistarh 2023, arXiv 2301.00774). Frank-Wolfe is in `frank_wolfe`, its refits are in `refit`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsefw.arithmetic import all_finite
from sparsefw.kernels import cpu
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.topk_torch import masked
from sparsefw.solver import frank_wolfe, paper
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.frank_wolfe import Choice, Problem, check_errors, mask_error
from sparsefw.solver.patterns import Pattern
from sparsefw.solver.refit import reselect

RIA_POWER = 0.5


def magnitude(W: Tensor, diag: Tensor) -> Tensor:
    """Saliency |W|."""
    return W.float().abs()


def wanda(W: Tensor, diag: Tensor) -> Tensor:
    """Saliency |W_ij| ||X_j||_2 (Sun et al., arXiv 2306.11695)."""
    return W.float().abs() * diag.sqrt()


def ria(W: Tensor, diag: Tensor) -> Tensor:
    """Saliency |W_ij| (1 / sum_k |W_ik| + 1 / sum_k |W_kj|) ||X_j||_2^0.5 (Zhang et al., ICLR 2024).

    The entries of a row or column of zeros are 0.
    """
    A = W.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    relative = A / A.sum(1, keepdim=True).clamp(min=tiny) + A / A.sum(0, keepdim=True).clamp(min=tiny)
    return relative * diag.sqrt().pow(RIA_POWER)


# Each takes W (rows, d) and diag (d,), the diagonal of the Gram matrix, and gives (rows, d) fp32, at least 0.
SALIENCIES = {"magnitude": magnitude, "wanda": wanda, "ria": ria}


def choose_frank_wolfe(problem: Problem, config: PruneConfig, backend: Backend) -> Choice:
    """Choose masks by Frank-Wolfe and, with `config.refit`, weights as well."""
    if not config.steps:
        # The errors of steps depend on all weights, that of the warm start's mask only on removed ones.
        check_finite(problem)
    if config.whole_matrix:
        problem, backend = paper.as_one_row(problem, backend)
    # NaN shows in the errors of the solution.
    warm = backend.lmo(problem.saliency, problem.k, group=problem.group, checked=False)
    if config.alpha:
        problem = replace(problem, fixed=paper.fixed_entries(problem, warm, config.alpha, backend))
    schedule = frank_wolfe.line_search(config.steps, config.penalty)
    if config.step_rule == "open-loop":
        schedule = paper.open_loop(schedule)
    # Damping made no difference to a mask that a refit starts from and chooses again.
    first = replace(problem, H=problem.G) if config.refit else problem
    choice = frank_wolfe.solve(first, warm, schedule, swaps=config.swaps, backend=backend)
    if config.preset != "paper":
        choice = frank_wolfe.or_warm_start(choice, warm, backend=backend)
    if not config.refit:
        return choice
    fit = reselect(
        problem,
        choice.mask,
        steps=config.steps,
        penalty=config.penalty,
        refit_steps=config.refit,
        rounds=config.rounds,
        backend=backend,
    )
    written = fit.Z.to(problem.dtype)
    error = backend.errors(problem.W.float() - written.float(), problem.exact)
    # Compared row by row, with the weights as they are written: no refit makes a row worse.
    better = error < choice.error
    backend.take_rows(choice.mask, fit.mask, better)
    backend.take_rows(written, masked(problem.W.to(problem.dtype), choice.mask), ~better)
    return replace(choice, weight=written, error=torch.where(better, error, choice.error))


def choose_saliency(problem: Problem, config: PruneConfig, backend: Backend) -> Choice:
    """Choose the warm start's mask."""
    check_finite(problem)
    mask = backend.lmo(problem.saliency, problem.k, group=problem.group)
    error = mask_error(problem.W, mask, problem.exact, backend=backend)
    check_errors(error)
    return Choice(mask, None, error, error, error, None)


def choose_sparsegpt(problem: Problem, config: PruneConfig, backend: Backend) -> Choice:
    """Choose masks and weights by SparseGPT."""
    check_finite(problem)
    mask, Z = sparsegpt(problem.W, problem.G, config.pattern, support=problem.support)
    return choice_of(problem, mask, Z, backend)


def choice_of(problem: Problem, mask: Tensor, Z: Tensor, backend: Backend) -> Choice:
    """Measure the errors of mask and weights, (rows, d) each, that a method gives at once."""
    # Only its error is reported.
    warm = backend.lmo(problem.saliency, problem.k, group=problem.group)
    written = Z.to(problem.dtype)
    error = backend.errors(problem.W.float() - written.float(), problem.exact)
    error_mask, error_warm_start = (mask_error(problem.W, m, problem.exact, backend=backend) for m in (mask, warm))
    check_errors(torch.stack([error, error_mask, error_warm_start]))
    return Choice(mask, written, error, error_mask, error_warm_start, None)


def check_finite(problem: Problem) -> None:
    """Raise FloatingPointError unless the weights and the Gram matrix are finite."""
    if not (all_finite(problem.W) & all_finite(problem.G)):
        raise FloatingPointError("NaN or Inf in the layer's weight or Gram matrix")


def sparsegpt(
    W: Tensor,
    G: Tensor,
    pattern: Pattern,
    *,
    support: Tensor | None = None,
    damp: float = 0.01,
    blocksize: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune one layer in one sweep over its inputs, and update its kept weights.

        minimise ||(W - Z) X||_F^2 = sum((W - Z) * ((W - Z) G)),  G = X X^T,  Z = 0 where the mask is False

    Columns are decided from left to right. The upper Cholesky factor C of the inverse, G^-1 = C^T C, gives the cost of
    removing W_ij once the columns before j are settled, and the best update of the weights after it:

        cost   = W_ij^2 / C_jj^2
        update   W_i,j: -= W_ij / C_jj * C_j,j:

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
        FloatingPointError: G is not positive definite.
    """
    rows, d = W.shape
    group = pattern.group
    width = max(group, blocksize // group * group) if group else blocksize
    C = inverse_factor(G, damp)
    # A copy: the sweep works in place.
    Z = W.float().masked_fill(G.diagonal() == 0, 0)
    mask = torch.empty_like(Z, dtype=torch.bool)
    for start in range(0, d, width):
        end = min(start + width, d)
        block, factor = slice(start, end), C[start:end, start:end]
        allowed = None if support is None else support[:, block]
        if not group:
            # The difference of two totals, so that the roundings of the blocks do not add up.
            budget = pattern.kept(rows * end) - pattern.kept(rows * start)
            mask[:, block] = _costliest(Z[:, block], factor, budget, 0, allowed)
        errors = _sweep(Z[:, block], mask[:, block], factor, pattern, allowed)
        Z[:, end:].addmm_(errors, C[start:end, end:], alpha=-1)
    return mask, Z


def inverse_factor(G: Tensor, damp: float) -> Tensor:
    """Factor the damped inverse by its upper Cholesky factor C, C^T C = (G + damp mean(diag G) I)^-1, (d, d) fp32.

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
    # No more than three matrices of this size at once, besides G.
    del lower, identity
    return inverse.flip((0, 1))


def _sweep(Z: Tensor, mask: Tensor, factor: Tensor, pattern: Pattern, allowed: Tensor | None) -> Tensor:
    """Settle the columns of one block, in place.

    Args:
        Z: (rows, width) fp32; zeroed outside the mask, updated inside.
        mask: (rows, width) bool, from `_costliest`; under n:m it is chosen here.
        factor: (width, width) fp32, the block's part of the Cholesky factor.
        pattern: what is kept.
        allowed: (rows, width) bool, weights that may be nonzero; None: all.

    Returns:
        errors (rows, width) fp32: the removed weights of each column over C_jj. The columns after the block move by
        -errors C.
    """
    errors = torch.empty_like(Z)
    group = pattern.group
    for j in range(Z.shape[1]):
        if group and j % group == 0:
            columns = slice(j, j + group)
            allowed_here = None if allowed is None else allowed[:, columns]
            n = pattern.kept(group)
            mask[:, columns] = _costliest(Z[:, columns], factor[columns, columns], n, group, allowed_here)
        errors[:, j] = Z[:, j].masked_fill(mask[:, j], 0) / factor[j, j]
        Z[:, j].masked_fill_(~mask[:, j], 0)
        Z[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
    return errors


def _costliest(Z: Tensor, factor: Tensor, k: int, group: int, allowed: Tensor | None) -> Tensor:
    """Keep the weights whose removal costs most: k of all, or of every group; only `allowed` ones."""
    # The square root of the cost has the same order and does not overflow.
    cost = (Z / factor.diagonal()).abs_()
    if allowed is not None:
        cost.masked_fill_(~allowed, -1)
    budgets = cost if group else cost.view(1, -1)
    mask: Tensor = cpu.lmo(budgets, k, group=group, checked=False).view(cost.shape)
    return mask if allowed is None else mask & allowed


# The function of each of METHODS.
CHOOSE: dict[str, Callable[[Problem, PruneConfig, Backend], Choice]] = {
    "sparsefw": choose_frank_wolfe,
    "sparsegpt": choose_sparsegpt,
    **dict.fromkeys(SALIENCIES, choose_saliency),
}
