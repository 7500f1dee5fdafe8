"""Mask and weights together: masks chosen for weights that are refitted.

The best mask of unchanged weights is not the best one once the kept weights make up for the removed ones. So the
choice is repeated with refitted weights in place of W:

1. Frank-Wolfe on W, as `frank_wolfe.solve` does, then a refit.
2. Frank-Wolfe on the candidates T = Z + R / diag(G): kept weights as they are, removed ones where a step of their own
   coordinate puts them. It minimises ||(W - M * T) X||_F^2; then a refit.
3. Rounds of re-selection: the k largest |T_j| sqrt(G_jj), then a refit, accepted in the rows whose error falls. Where
   it does not, too much was exchanged at once: in the next round kept entries leave only for others that are better by
   a margin.
"""

from types import ModuleType

import torch
from torch import Tensor

from sparsefw.kernels.topk_torch import as_float, keep
from sparsefw.solver import frank_wolfe
from sparsefw.solver.frank_wolfe import Problem, operand
from sparsefw.solver.refit import Fit, inverse_diagonal, refit

# Steps of the second Frank-Wolfe per step of the first. Of 40 steps in all, 30 + 10 left the lowest error.
RESTART = 1 / 3

# The margin of a row after a rejected round, 2 margin + 0.1, and after an accepted one, 0.7 margin.
WIDEN, FIRST, NARROW = 2.0, 0.1, 0.7


def refine(
    problem: Problem,
    mask: Tensor,
    *,
    steps: int,
    penalty: float,
    refit_steps: int,
    rounds: int,
    precision: str,
    ops: ModuleType,
) -> Fit:
    """Refit a mask's weights, choose masks for refitted weights, and keep the best of every row.

    Args:
        problem: the layer, with its Gram matrix damped; its warm start and fixed entries play no part any more.
        mask: (rows, d) bool, from `frank_wolfe.solve`.
        steps, penalty: of the first Frank-Wolfe.
        refit_steps: conjugate-gradient steps of each refit.
        rounds: rounds of re-selection; 0 keeps the mask, without a second Frank-Wolfe.
        precision, ops: as in `frank_wolfe.solve`.

    Returns:
        The fit of the lowest error, on the damped Gram matrix, in every row. What is not finite is never lower, so
        that nothing is looked at, which a GPU would be waited for.
    """
    W, G, options = problem.W, problem.G, {"precision": precision, "ops": ops}
    # Converted once.
    inverse, H = inverse_diagonal(G), operand(G, precision)
    best = refit(W, H, mask, W.float(), refit_steps, **options)
    if rounds == 0:
        return best
    T = _candidates(best, inverse)
    best.take_better(refit(W, H, _restart(problem, T, steps, penalty, options), T, refit_steps, **options))
    margin = torch.zeros_like(best.error)
    for _ in range(rounds):
        T = _candidates(best, inverse)
        score = _score(T, G).mul_(1 + margin[:, None] * as_float(best.mask))
        chosen = ops.lmo(score, problem.k, group=problem.group, checked=False)
        better = best.take_better(refit(W, H, chosen, T, refit_steps, **options))
        margin = torch.where(better, NARROW * margin, WIDEN * margin + FIRST)
    return best


def _restart(problem: Problem, T: Tensor, steps: int, penalty: float, options: dict) -> Tensor:
    """The mask that Frank-Wolfe finds for the candidates T, (rows, d) bool."""
    ops = options["ops"]
    score = _score(T, problem.G)
    warm = ops.lmo(score, problem.k, group=problem.group, checked=False)
    again = Problem(T, problem.G, score, problem.k, warm, None, problem.group, lacks=problem.W - T)
    M = as_float(warm)
    for state in frank_wolfe.iterate(
        again, steps=round(RESTART * steps), step_rule="line-search", penalty=penalty, **options
    ):
        M = state.M
    return frank_wolfe.round_mask(again, M, ops=ops)


def _candidates(fit: Fit, inverse: Tensor) -> Tensor:
    """T = Z + R / diag(G), the second term where the mask removes."""
    return fit.Z + keep(fit.R * inverse, ~fit.mask)


def _score(T: Tensor, G: Tensor) -> Tensor:
    """|T_j| sqrt(G_jj): the error of removing one weight alone, its root."""
    return T.abs() * G.diagonal().sqrt()
