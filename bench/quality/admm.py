"""Prune by ADMM, with the flags of a run: `python bench/quality/admm.py --method admm ...`.

ADMM (Boza 2024, arXiv 2401.02938) is a rival in the quality study. The package does not offer it.
"""

import sys

import torch
from torch import Tensor

import sparsefw.run
from sparsefw.errors import InputError
from sparsefw.kernels import cpu
from sparsefw.kernels.backend import Backend
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.frank_wolfe import Choice, Problem
from sparsefw.solver.methods import add_method, check_finite, choice_of

# Steps in all, and steps in which the mask is chosen.
STEPS, RAMP = 20, 15
# Added to the diagonal of the scaled Gram matrix, as a fraction of the diagonal's mean. The target A H includes it.
DAMP = 0.1


def admm(W: Tensor, G: Tensor, k: int, group: int) -> tuple[Tensor, Tensor]:
    """Choose a mask gradually, and update the weights by the alternating direction method of multipliers.

    Inputs are scaled to norm 1: H = G / (n_i n_j) + damp, A = W n. With a penalty of 1 and step t = 1, 2, ...

        mask   the highest |B + U| of each row, for t <= RAMP; the number removed rises to the budget as
               1 - (1 - t / RAMP)^3; under n:m the n highest of each group are never removed
        Z = (B + U) * mask,   U += B - Z,   B = (A H + Z - U) (H + I)^-1

    The published code does this with the option that gives each row the same budget.

    Args:
        W: (rows, d) fp32 weight.
        G: (d, d) fp32 Gram matrix. The weights of inputs whose diagonal entry is 0 become 0.
        k: kept weights per row; with `group`, per group.
        group: m of n:m, else 0.

    Returns:
        mask (rows, d) bool, and the weights (rows, d) fp32, exactly 0 outside the mask.
    """
    d = W.shape[1]
    dead = G.diagonal() == 0
    norm = G.diagonal().sqrt().masked_fill(dead, 1)
    A = (W.float() * norm).masked_fill(dead, 0)
    H = G / norm / norm[:, None]
    H.diagonal().add_(DAMP * H.diagonal().mean())
    AH = A @ H
    H.diagonal().add_(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    removed = d - (k * (d // group) if group else k)
    B, U = A, torch.zeros_like(A)
    for t in range(1, STEPS + 1):
        if t <= RAMP:
            score = (B + U).abs()
            kept = d - int(removed * (1 - (1 - t / RAMP) ** 3))
            best = cpu.lmo(score, k, group=group) if group else None
            mask = cpu.lmo(score, kept, fixed=best)
        Z = (B + U) * mask
        U += B - Z
        B = (AH + Z - U) @ inverse
    return mask, (B + U).masked_fill(~mask, 0) / norm


def choose_admm(problem: Problem, config: PruneConfig, backend: Backend) -> Choice:
    """Choose masks and weights of a problem by ADMM."""
    check_finite(problem)
    if isinstance(problem.k, Tensor):
        raise InputError(f"--sparsity {config.sparsity}: ADMM takes the same budget in every row only")
    return choice_of(problem, *admm(problem.W, problem.G, problem.k, problem.group), backend)


def add_admm() -> None:
    """Add the method to those of this process."""
    # ADMM factors G in every call, so rows are not solved in chunks.
    add_method("admm", choose_admm, saliency="wanda", rows_independent=False, changes_weights=True)


if __name__ == "__main__":
    add_admm()
    sys.exit(sparsefw.run.main(sys.argv[1:]))
