"""Refit the kept weights of a mask, and choose masks again for refitted weights.

In a refit the kept weights make up for the removed ones:

    minimise ||(W - Z) X||_F^2 = sum((W - Z) * ((W - Z) G)) over Z, zero outside the mask

Each row is a least-squares problem of its own, which conjugate gradients solve with the diagonal of G as the
preconditioner. A step costs one product. Callers pass H, which is G with damping (`targets.damped`), in place of G.
Damping draws Z towards W, and stops weights whose inputs are nearly the same from growing with opposite signs.

The best mask for unchanged weights is not the best one for refitted weights. So `reselect` chooses again:

1. Frank-Wolfe on W has chosen a mask (`frank_wolfe.solve`). Refit it.
2. Run Frank-Wolfe on candidates C: it minimises ||(W - M * C) X||_F^2 over M. C is Z at kept weights. At removed ones
   it is Z + R / diag(H), R = (W - Z) H, the value after an exact step along the coordinate. Refit the mask that it
   finds.
3. In each round, keep the k largest |C_j| sqrt(H_jj) and refit them. A row accepts a round that lowers its error. In a
   row that rejects it, the round has exchanged too many weights: in the next round, a removed weight must beat a kept
   weight by a margin.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sparsefw.kernels import plain
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.kernels.masks import as_float
from sparsefw.solver import frank_wolfe
from sparsefw.solver.frank_wolfe import Problem, Schedule

# The second Frank-Wolfe makes this fraction of the steps of the first. Of all splits of 40 steps, 30 + 10 left the
# lowest error.
RESTART = 1 / 3

# The margin of a row becomes 2 margin + 0.1 after a rejected round, and 0.7 margin after an accepted one.
WIDEN, FIRST, NARROW = 2.0, 0.1, 0.7


@dataclass
class RowFit:
    """Refitted weights of a mask, with their error.

    Attributes:
        mask: (rows, d) bool, True keeps a weight.
        Z: (rows, d) fp32, 0 outside the mask.
        R: (rows, d) fp32, (W - Z) H.
        error: (rows,) fp32, the error on H: sum((W - Z) * R) of each row.
    """

    mask: Tensor
    Z: Tensor
    R: Tensor
    error: Tensor

    def take_better(self, other: "RowFit", backend: Backend = TORCH) -> Tensor:
        """Replace in place the rows in which the other fit has a lower error. Returns these rows as (rows,) bool."""
        better = other.error < self.error
        for name in ("mask", "Z", "R"):
            backend.take_rows(getattr(self, name), getattr(other, name), better)
        self.error = torch.where(better, other.error, self.error)
        return better


def inverse_diagonal(G: Tensor) -> Tensor:
    """Invert the diagonal of a Gram matrix, (d,) fp32. The result is 0 for dead inputs, and where it would overflow."""
    diagonal = G.diagonal().float()
    return torch.where(diagonal >= torch.finfo(diagonal.dtype).tiny, 1 / diagonal, 0)


def refit(W: Tensor, H: Tensor, mask: Tensor, start: Tensor, steps: int, *, backend: Backend = TORCH) -> RowFit:
    """Refit the kept weights of a mask by `descend`.

    Kept weights of dead inputs stay at their start.

    Args:
        W: (rows, d) weights to approximate, fp32 / bf16 / fp16.
        H: (d, d) damped Gram matrix; fp32, or from `Backend.operand`.
        mask: (rows, d) bool, True keeps a weight.
        start: (rows, d) fp32 start of Z; entries outside the mask are ignored.
        steps: number of conjugate-gradient steps. Each costs one product, and the start costs another one.
        backend: the operations.
    """
    Z, E = plain.begin_fit(W, start, mask, dtype=backend.operand_dtype(torch.float32))
    R = backend.product(E, backend.operand(H))
    # Frees E's memory for the steps.
    del E
    descend(Z, R, H, mask, steps, backend=backend)
    return RowFit(mask, Z, R, plain.row_errors(W, R, Z))


def descend(Z: Tensor, R: Tensor, H: Tensor, mask: Tensor | None, steps: int, *, backend: Backend) -> None:
    """Minimise sum(Z * (Z H)) / 2 - sum(Z * B) over Z in place, by preconditioned conjugate gradients.

    A step is the product P H followed by `conjugate_step`. In fp32 no step raises the objective.

    Args:
        Z: (rows, d) fp32 weights, changed in place.
        R: (rows, d) fp32 residual B - Z H, changed in place together with Z.
        H: (d, d), as in `refit`.
        mask: (rows, d) bool, True where a weight moves; None: everywhere.
        steps, backend: as in `refit`.
    """
    if not steps:
        return
    operand, U = backend.operand(H), torch.empty_like(Z)
    # P has the dtype in which products read it. So Z and R move along the same, perhaps rounded, P, and R stays the
    # residual of Z.
    P = torch.empty_like(Z, dtype=operand.dtype)
    rz, enough = Z.new_empty(2, len(Z))
    state = (Z, R, P, U, rz, enough, inverse_diagonal(H))
    backend.conjugate_step(*state, mask=mask, first=True)
    for step in range(1, steps + 1):
        backend.product(P, operand, out=U)
        backend.conjugate_step(*state, mask=mask, last=step == steps)


def reselect(
    problem: Problem,
    mask: Tensor,
    *,
    steps: int,
    penalty: float,
    refit_steps: int,
    rounds: int,
    backend: Backend = TORCH,
) -> RowFit:
    """Refit a mask, choose masks again for the refitted weights, and keep the best fit of every row.

    Args:
        problem: the rows. Weights are fitted on its H. New masks need not keep the fixed entries.
        mask: (rows, d) bool, from `frank_wolfe.solve`.
        steps, penalty: steps and final penalty of the first Frank-Wolfe.
        refit_steps: conjugate-gradient steps of each refit.
        rounds: number of rounds; with 0 there is no second Frank-Wolfe either, and the mask stays.
        backend: the operations.

    Returns:
        The fit with the lowest error on H in every row. NaN and Inf never count as lower, so no check is needed that
        would make the host wait for the GPU.
    """
    W, support = problem.W, problem.support
    # H is converted once for all refits.
    operand = backend.operand(problem.H)
    inverse, root = inverse_diagonal(problem.H), problem.H.diagonal().float().sqrt()

    def fit(mask: Tensor, start: Tensor) -> RowFit:
        if support is not None:
            mask = mask & support
        return refit(W, operand, mask, start, refit_steps, backend=backend)

    # A copy, since rows of the best fit are replaced in place.
    best = fit(mask.clone(), W)
    if rounds == 0:
        return best
    candidates = partial(plain.candidates, best.Z, best.R, best.mask, inverse, root, support=support)
    C, score = candidates()
    schedule = frank_wolfe.penalty_schedule(round(RESTART * steps), penalty)
    best.take_better(fit(_restart(problem, C, score, schedule, backend), C), backend)
    margin = torch.zeros_like(best.error)
    for _ in range(rounds):
        C, score = candidates(margin=margin)
        chosen = backend.lmo(score, problem.k, group=problem.group, check_nan=False)
        # Frees the score's memory for the refit.
        del score
        better = best.take_better(fit(chosen, C), backend)
        margin = torch.where(better, NARROW * margin, WIDEN * margin + FIRST)
    return best


def _restart(problem: Problem, C: Tensor, score: Tensor, schedule: Schedule, backend: Backend) -> Tensor:
    """Choose a mask for the candidates C by Frank-Wolfe, (rows, d) bool; `score` is the candidates' saliency."""
    candidates = replace(problem, W=C, saliency=score, target_gap=problem.W - C, fixed=None)
    warm = backend.lmo(score, problem.k, group=problem.group, check_nan=False)
    M = as_float(warm)
    for state in frank_wolfe.iterate(candidates, warm, schedule, backend=backend):
        M = state.M
    return backend.round_mask(M, score, problem.k, group=problem.group)
