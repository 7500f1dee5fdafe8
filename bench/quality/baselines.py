"""Methods that the benchmarks compare with and the product does not offer.

    admm        gradual mask and weight update (Boza 2024, arXiv 2401.02938)
    one_swaps   best-1-swap local search on a mask (SparseSwaps, arXiv 2512.10922)

W (rows, d), the Gram matrix G (d, d) fp32 and the budget are those of `sparsefw.kernels.cpu`: k weights are kept
per row or, with `group`, per group. `register` makes them methods of the product, which `--method` takes.
"""

from itertools import count, islice

import torch
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.kernels import cpu
from sparsefw.kernels.backend import Backend
from sparsefw.solver.config import METHODS, Method, PruneConfig
from sparsefw.solver.frank_wolfe import Choice, Problem, mask_error
from sparsefw.solver.methods import CHOOSE, check_finite, choice_of

# A swap counts only if it lowers the row's error by this fraction of the first error. A smaller gain may be rounding,
# and a search that follows rounding may never end.
TOLERANCE = 1e-6


def admm(
    W: Tensor, G: Tensor, k: int, *, group: int = 0, steps: int = 20, damp: float = 0.1, ramp: int = 15
) -> tuple[Tensor, Tensor]:
    """Weight update by the alternating direction method of multipliers, with gradual mask selection.

    Inputs are scaled to norm 1, H = G / (n_i n_j) + damp, A = W n. Then, with a penalty rho of 1 and step t = 1, 2, ...

        mask   the highest |B + U| of each row, for t <= ramp; the number removed rises to the budget as
               1 - (1 - t / ramp)^3; under n:m the n highest of each group are never removed
        Z = (B + U) * mask,   U += B - Z,   B = (A H + Z - U) (H + I)^-1

    The published code does this with the option that gives each row the same budget.

    Args:
        W: (rows, d) weight, fp32 / bf16 / fp16.
        G: (d, d) fp32 Gram matrix. Inputs whose diagonal entry is 0 are dead: their weights become 0.
        k: kept weights per row; with `group`, per group.
        group: m of n:m, else 0.
        steps: iterations.
        damp: addition to the diagonal of the scaled G, as a fraction of its mean; the target A H includes it.
        ramp: steps over which the mask is chosen; then the mask stays.

    Returns:
        mask (rows, d) bool, and the weights (rows, d) fp32, exactly 0 outside the mask.

    Raises:
        ValueError: the ramp does not end within the steps.
    """
    if not 1 <= ramp <= steps:
        raise ValueError(f"ramp: expected 1 to steps = {steps}, got {ramp}")
    d = W.shape[1]
    dead = G.diagonal() == 0
    norm = G.diagonal().sqrt().masked_fill(dead, 1)
    A = (W.float() * norm).masked_fill(dead, 0)
    H = G / norm / norm[:, None]
    H.diagonal().add_(damp * H.diagonal().mean())
    AH = A @ H
    H.diagonal().add_(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    removed = d - (k * (d // group) if group else k)
    B, U = A, torch.zeros_like(A)
    for t in range(1, steps + 1):
        if t <= ramp:
            score = (B + U).abs()
            kept = d - int(removed * (1 - (1 - t / ramp) ** 3))
            best = cpu.lmo(score, k, group=group) if group else None
            mask = cpu.lmo(score, kept, fixed=best)
        Z = (B + U) * mask
        U += B - Z
        B = (AH + Z - U) @ inverse
    return mask, (B + U).masked_fill(~mask, 0) / norm


def one_swaps(W: Tensor, G: Tensor, mask: Tensor, *, group: int = 0, limit: int | None = None) -> Tensor:
    """Best-1-swap local search: per row, make the swap that lowers the error most, until none does.

    Removing the kept i and restoring the removed p changes a row's error, with R = (W * (1 - mask)) G, by exactly

        a_i + b_p - 2 W_i W_p G_ip,   a = W^2 diag(G) + 2 W R,   b = W^2 diag(G) - 2 W R

    Args:
        W: (rows, d) weight, fp32 / bf16 / fp16.
        G: (d, d) fp32 Gram matrix.
        mask: (rows, d) bool, where the search starts.
        group: m of n:m, else 0; swaps stay within a group.
        limit: most swaps per row; None goes on to the local optimum.

    Returns:
        mask (rows, d) bool; no row has a higher error than before.

    Raises:
        FloatingPointError: NaN or Inf in W or G.
    """
    if not (W.isfinite().all() and G.isfinite().all()):
        raise FloatingPointError("NaN or Inf in the layer's weight or Gram matrix")
    swapped = mask.clone()
    for w, row in zip(W.float(), swapped, strict=True):
        _swap_row(w, G, row, group, limit)
    # The search adds up changes. Its mask is taken only where an error computed from scratch agrees.
    better = mask_error(W, swapped, G) < mask_error(W, mask, G)
    return torch.where(better[:, None], swapped, mask)


def _swap_row(w: Tensor, G: Tensor, mask: Tensor, group: int, limit: int | None) -> None:
    """The search in one row: w (d,) fp32, mask (d,) bool, in place."""
    q = w * w * G.diagonal()
    removed = w.masked_fill(mask, 0)
    R = G @ removed
    error = float(removed @ R)
    least = TOLERANCE * error
    # 2 W_i W_p G_ip of the pairs within every group; without groups the row is one.
    index = torch.arange(len(w), device=w.device).view(-1, group or len(w))
    pairs = G[index[:, :, None], index[:, None, :]] * w[index][:, None, :] * (2 * w[index][:, :, None])
    for _ in islice(count(), limit):
        lin = 2 * w * R
        a, b = (q + lin).masked_fill_(~mask, torch.inf), (q - lin).masked_fill_(mask, torch.inf)
        # The best partner of every i, then the best i.
        change, partner = (b[index][:, None, :] - pairs).min(2)
        change = change.view(-1) + a
        i = int(change.argmin())
        p = int(index[i // index.shape[1], partner.view(-1)[i]])
        # Nothing is left to gain once the changes add up to the whole error; only rounding could go on.
        if not change[i] < -least or error <= 0:
            return
        error += float(change[i])
        mask[i], mask[p] = False, True
        R.add_(G[i] * w[i]).sub_(G[p] * w[p])


def _one_budget(problem: Problem, config: PruneConfig) -> int:
    if isinstance(problem.k, Tensor):
        raise InputError(f"--sparsity {config.sparsity}: this method takes the same budget in every row only")
    return problem.k


def _admm(problem: Problem, config: PruneConfig, backend: Backend) -> Choice:
    """ADMM, which has a damping of its own."""
    check_finite(problem)
    return choice_of(problem, *admm(problem.W, problem.G, _one_budget(problem, config), group=problem.group), backend)


def _one_swaps(problem: Problem, config: PruneConfig, backend: Backend) -> Choice:
    """Best 1-swaps from the warm start."""
    warm = backend.lmo(problem.saliency, _one_budget(problem, config), group=problem.group)
    mask = one_swaps(problem.W, problem.G, warm, group=problem.group)
    error, before = (mask_error(problem.W, m, problem.G, backend=backend) for m in (mask, warm))
    return Choice(mask, None, error, error, before, None)


BASELINES = {
    "one-swaps": (Method(saliency="wanda"), _one_swaps),
    # It factors G in every call, so rows are not solved in chunks.
    "admm": (Method(saliency="wanda", rows_independent=False, changes_weights=True), _admm),
}


def register() -> None:
    """Add the baselines to the methods of this process."""
    for name, methods in BASELINES.items():
        METHODS[name], CHOOSE[name] = methods
