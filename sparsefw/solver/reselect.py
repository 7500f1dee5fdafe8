"""Re-selection: masks chosen again for weights that are refitted.

The best mask of unchanged weights is not the best one once the kept weights make up for the removed ones. So the
choice is repeated with refitted weights in place of W:

1. Frank-Wolfe on W, as `frank_wolfe.solve` does, then a refit.
2. Frank-Wolfe on the candidates T = Z + R / diag(G): kept weights as they are, removed ones where an exact step along
   their own coordinate puts them. It minimises ||(W - M * T) X||_F^2; then a refit.
3. Rounds of re-selection: the k largest |T_j| sqrt(G_jj), then a refit, accepted in the rows whose error falls. In the
   other rows too much was exchanged at once: in the next round they replace kept entries only by entries that are
   better by a margin.
"""

import torch
from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.kernels.topk_torch import as_float
from sparsefw.solver import frank_wolfe
from sparsefw.solver.frank_wolfe import Problem
from sparsefw.solver.refit import Fit, inverse_diagonal, refit

# Steps of the second Frank-Wolfe per step of the first. Of splits of 40 steps, 30 + 10 left the lowest error.
RESTART = 1 / 3

# The margin of a row after a rejected round, 2 margin + 0.1, and after an accepted one, 0.7 margin.
WIDEN, FIRST, NARROW = 2.0, 0.1, 0.7


def reselect(
    problem: Problem,
    mask: Tensor,
    *,
    steps: int,
    penalty: float,
    refit_steps: int,
    rounds: int,
    support: Tensor | None = None,
    backend: Backend = TORCH,
) -> Fit:
    """Refit a mask's weights, choose masks for refitted weights, and keep the best of every row.

    Args:
        problem: the layer, with its Gram matrix damped; its warm start and fixed entries are not used.
        mask: (rows, d) bool, from `frank_wolfe.solve`.
        steps, penalty: of the first Frank-Wolfe.
        refit_steps: conjugate-gradient steps of each refit.
        rounds: rounds of re-selection; 0 keeps the mask, without a second Frank-Wolfe.
        support: (rows, d) bool, weights that may be nonzero; None: all.
        backend: the operations.

    Returns:
        The fit of the lowest error, on the damped Gram matrix, in every row. An error that is not finite is never
        lower. So no check is needed that would make the host wait for a GPU.
    """
    W, G = problem.W, problem.G
    # Converted once, for all refits.
    inverse, root, G_operand = inverse_diagonal(G), G.diagonal().float().sqrt(), backend.operand(G)

    def fit(mask: Tensor, start: Tensor) -> Fit:
        if support is not None:
            mask = mask & support
        return refit(W, G_operand, mask, start, refit_steps, backend=backend)

    def candidates(margin: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return backend.candidates(best.Z, best.R, best.mask, inverse, root, margin=margin, support=support)

    # A copy: the best fit is replaced row by row, in place.
    best = fit(mask.clone(), W)
    if rounds == 0:
        return best
    T, score = candidates()
    best.take_better(fit(_restart(problem, T, score, steps, penalty, backend), T), backend)
    margin = torch.zeros_like(best.error)
    for _ in range(rounds):
        T, score = candidates(margin)
        chosen = backend.lmo(score, problem.k, group=problem.group, checked=False)
        # Free its memory for the fit.
        del score
        better = best.take_better(fit(chosen, T), backend)
        margin = torch.where(better, NARROW * margin, WIDEN * margin + FIRST)
    return best


def _restart(problem: Problem, T: Tensor, score: Tensor, steps: int, penalty: float, backend: Backend) -> Tensor:
    """The mask that Frank-Wolfe finds for the candidates T with these scores, (rows, d) bool."""
    warm = backend.lmo(score, problem.k, group=problem.group, checked=False)
    candidate_problem = Problem(T, problem.G, score, problem.k, warm, None, problem.group, target_gap=problem.W - T)
    M = as_float(warm)
    for state in frank_wolfe.iterate(
        candidate_problem, steps=round(RESTART * steps), step_rule="line-search", penalty=penalty, backend=backend
    ):
        M = state.M
    return frank_wolfe.round_mask(candidate_problem, M, backend=backend)
