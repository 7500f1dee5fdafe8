"""The methods: for each name in METHODS a function that chooses masks and, with some methods, new weights.

A saliency scores the importance of each weight by itself. Each saliency is also a method. Frank-Wolfe uses a saliency
for its warm start, for fixed entries and to break ties. SparseGPT chooses mask and weights of one layer in one sweep
over its inputs (Frantar & Alistarh 2023, arXiv 2301.00774). The steps of Frank-Wolfe are in `frank_wolfe`, refits in
`refit`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsefw.arithmetic import all_finite
from sparsefw.kernels import cpu, plain
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.masks import masked
from sparsefw.solver import frank_wolfe, paper
from sparsefw.solver.config import COLUMN_SALIENCIES, METHODS, WARM_STARTS, Method, PruneConfig
from sparsefw.solver.frank_wolfe import Choice, Problem, check_errors
from sparsefw.solver.patterns import Pattern
from sparsefw.solver.refit import reselect

RIA_POWER = 0.5


def magnitude(W: Tensor, G: Tensor) -> Tensor:
    """Saliency |W|."""
    return W.float().abs()


def wanda(W: Tensor, G: Tensor) -> Tensor:
    """Saliency |W_ij| ||X_j||_2 (Sun et al., arXiv 2306.11695)."""
    return W.float().abs() * G.diagonal().sqrt()


def ria(W: Tensor, G: Tensor) -> Tensor:
    """Saliency |W_ij| (1 / sum_k |W_ik| + 1 / sum_k |W_kj|) ||X_j||_2^0.5 (Zhang et al., ICLR 2024).

    A row or column of zeros has saliency 0.
    """
    A = W.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    relative = A / A.sum(1, keepdim=True).clamp(min=tiny) + A / A.sum(0, keepdim=True).clamp(min=tiny)
    return relative * G.diagonal().sqrt().pow(RIA_POWER)


# A saliency takes the weight W (rows, d) and the Gram matrix G (d, d) of its inputs, which are not kept themselves. It
# returns (rows, d) fp32, at least 0.
Saliency = Callable[[Tensor, Tensor], Tensor]
SALIENCIES: dict[str, Saliency] = {"magnitude": magnitude, "wanda": wanda, "ria": ria}


def choose_frank_wolfe(problem: Problem, config: PruneConfig, backend: Backend, refits: bool = True) -> Choice:
    """Choose masks by Frank-Wolfe and, with `refits` and `config.refit`, weights as well."""
    refits = refits and bool(config.refit)
    if not config.steps:
        # The error of a step shows NaN and Inf in all weights. The error of the warm start's mask does not show them in
        # the kept weights.
        check_finite(problem)
    if config.whole_matrix:
        problem, backend = paper.as_one_row(problem, backend)
    # Not checked for NaN here: `solve` finds NaN in the errors at its end.
    warm = backend.lmo(problem.saliency, problem.k, group=problem.group, check_nan=False)
    if config.alpha:
        problem = replace(problem, fixed=paper.fixed_entries(problem, warm, config.alpha, backend))
    schedule = frank_wolfe.penalty_schedule(config.steps, config.penalty)
    if config.step_rule == "open-loop":
        schedule = paper.open_loop(schedule)
    # With a refit the mask is chosen again, on H. Choosing the first mask on H as well made no measurable difference.
    first = replace(problem, H=problem.G) if refits else problem
    choice = frank_wolfe.solve(first, warm, schedule, swaps=config.swaps, backend=backend)
    if config.preset != "paper":
        choice = frank_wolfe.or_warm_start(choice, warm, backend=backend)
    if not refits:
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
    # Compares errors row by row, with weights as they are written, so that a refit never makes a row worse.
    better = error < choice.error
    backend.take_rows(choice.mask, fit.mask, better)
    backend.take_rows(written, masked(problem.W.to(problem.dtype), choice.mask), ~better)
    return replace(choice, weight=written, error=torch.where(better, error, choice.error))


def choose_saliency(problem: Problem, config: PruneConfig, backend: Backend) -> Choice:
    """Choose the weights of the highest saliency."""
    check_finite(problem)
    mask = backend.lmo(problem.saliency, problem.k, group=problem.group)
    error = mask_error(problem, mask, backend)
    warm = error if problem.warm is None else mask_error(problem, problem.warm, backend)
    check_errors(error)
    return Choice(mask, None, error, error, warm, None)


def choose_sparsegpt(problem: Problem, config: PruneConfig, backend: Backend) -> Choice:
    """Choose masks and weights by SparseGPT."""
    check_finite(problem)
    mask, Z = sparsegpt(problem.W, problem.G, config.pattern, support=problem.support)
    return choice_of(problem, mask, Z, backend)


def choice_of(problem: Problem, mask: Tensor, Z: Tensor, backend: Backend) -> Choice:
    """Make the `Choice` of a mask and its weights Z, (rows, d) each: round the weights and measure the errors."""
    # The warm start is needed only for its error, which the report has.
    warm = problem.warm
    if warm is None:
        warm = backend.lmo(problem.saliency, problem.k, group=problem.group)
    written = Z.to(problem.dtype)
    error = backend.errors(problem.W.float() - written.float(), problem.exact)
    error_mask, error_warm_start = (mask_error(problem, m, backend) for m in (mask, warm))
    check_errors(torch.stack([error, error_mask, error_warm_start]))
    return Choice(mask, written, error, error_mask, error_warm_start, None)


def check_finite(problem: Problem) -> None:
    """Raise FloatingPointError unless the weights and the Gram matrix are finite."""
    if not (all_finite(problem.W) & all_finite(problem.G)):
        raise FloatingPointError("NaN or Inf in the layer's weight or Gram matrix")


def mask_error(problem: Problem, mask: Tensor, backend: Backend) -> Tensor:
    """Compute the error of a binary mask with unchanged weights, (rows,) fp32."""
    return backend.errors(plain.removed(problem.W, mask), problem.exact)


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

    The sweep goes through the columns from left to right. C is the upper Cholesky factor of the inverse, G^-1 = C^T C.
    C gives the cost of removing W_ij once the columns before j are final, and the best update of the columns after j:

        cost   = W_ij^2 / C_jj^2
        update   W_i,j: -= W_ij / C_jj * C_j,j:

    As published, a block of columns gets its mask when the sweep reaches the block, with one budget for all rows. So
    the scopes `row` and `layer` are the same here, and rows keep different numbers of weights. Under n:m a group gets
    its mask when the sweep reaches the group, and the width of a block is a multiple of m. Unlike in the published
    code, ties do not remove additional weights: the budgets of the blocks add up to the layer's budget exactly.

    Args:
        W: (rows, d) weight, fp32 / bf16 / fp16.
        G: (d, d) fp32 Gram matrix. An input with a diagonal entry of 0 is dead, and its weights become 0.
        pattern: the pattern of sparsity; d is a multiple of its group.
        support: (rows, d) bool, True where a weight may be nonzero; None: everywhere.
        damp: addition to the diagonal of G, as a fraction of its mean.
        blocksize: number of columns of a block; under n:m rounded down to whole groups, but at least one group.

    Returns:
        The mask (rows, d) bool, True keeps a weight, and the weights Z (rows, d) fp32, exactly 0 outside the mask. If
        values overflow, Z is not finite.

    Raises:
        FloatingPointError: G is not positive definite.
    """
    rows, d = W.shape
    group = pattern.group
    width = max(group, blocksize // group * group) if group else blocksize
    C = inverse_factor(G, damp)
    # `masked_fill` copies W, since the sweep works in place.
    Z = W.float().masked_fill(G.diagonal() == 0, 0)
    mask = torch.empty_like(Z, dtype=torch.bool)
    for start in range(0, d, width):
        end = min(start + width, d)
        block, factor = slice(start, end), C[start:end, start:end]
        allowed = None if support is None else support[:, block]
        if not group:
            # A difference of two rounded totals. If each block's budget were rounded, the roundings would add up.
            budget = pattern.kept(rows * end) - pattern.kept(rows * start)
            mask[:, block] = _costliest(Z[:, block], factor, budget, 0, allowed)
        errors = _sweep(Z[:, block], mask[:, block], factor, pattern, allowed)
        Z[:, end:].addmm_(errors, C[start:end, end:], alpha=-1)
    return mask, Z


def inverse_factor(G: Tensor, damp: float) -> Tensor:
    """Compute the upper Cholesky factor C of the damped inverse: C^T C = (G + damp mean(diag G) I)^-1, (d, d) fp32.

    The lower Cholesky factor of G with rows and columns reversed is, reversed again, an upper factor P with G = P P^T.
    Hence C = P^-1. This needs one decomposition. The published code decomposes, inverts and decomposes again.

    Args:
        G: (d, d) fp32 Gram matrix; a diagonal entry of 0 counts as 1.
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
    # Freed so that, besides G, at most three matrices of this size exist at the same time.
    del lower, identity
    return inverse.flip((0, 1))


def _sweep(Z: Tensor, mask: Tensor, factor: Tensor, pattern: Pattern, allowed: Tensor | None) -> Tensor:
    """Make the columns of one block final, in place.

    Args:
        Z: (rows, width) fp32 weights. Kept weights are updated, removed weights become 0.
        mask: (rows, width) bool, from `_costliest`; under n:m it is filled here, group by group.
        factor: (width, width) fp32 part of the Cholesky factor C with the block's rows and columns.
        pattern: the pattern of sparsity.
        allowed: (rows, width) bool, True where a weight may be nonzero; None: everywhere.

    Returns:
        The removed weights, each divided by the C_jj of its column, (rows, width) fp32. The caller subtracts their
        product with C from the columns after the block.
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
    """Choose the k weights whose removal costs most, of all rows together or, with `group`, of every group.

    Weights that are False in `allowed` are not chosen.
    """
    # The square root of the cost has the same order, and does not overflow.
    cost = (Z / factor.diagonal()).abs_()
    if allowed is not None:
        cost.masked_fill_(~allowed, -1)
    budgets = cost if group else cost.view(1, -1)
    mask: Tensor = cpu.lmo(budgets, k, group=group, check_nan=False).view(cost.shape)
    return mask if allowed is None else mask & allowed


# The function of each method.
Choose = Callable[[Problem, PruneConfig, Backend], Choice]
CHOOSE: dict[str, Choose] = {
    "sparsefw": choose_frank_wolfe,
    "frank-wolfe": partial(choose_frank_wolfe, refits=False),
    "refitted": choose_frank_wolfe,
    "sparsegpt": choose_sparsegpt,
    **dict.fromkeys(SALIENCIES, choose_saliency),
}


def add_method(name: str, choose: Choose, **properties: Any) -> None:
    """Add a method, for `--method` and `--compare`.

    Args:
        name: its name.
        choose: chooses the masks and, if it changes weights, the weights of a problem; `choice_of` makes a `Choice`.
        properties: fields of `Method`.
    """
    METHODS[name], CHOOSE[name] = Method(**properties), choose


def add_saliency(name: str, saliency: Saliency, rows_independent: bool = True) -> None:
    """Add a saliency, for `--warm-start`, and as a method that keeps the weights of the highest saliency.

    Args:
        name: its name.
        saliency: the function, see `Saliency`.
        rows_independent: whether it knows a row's saliency from this row alone. If not, it gets whole matrices.
    """
    SALIENCIES[name] = saliency
    WARM_STARTS.append(name)
    if not rows_independent:
        COLUMN_SALIENCIES.append(name)
    add_method(name, choose_saliency, saliency=name)
