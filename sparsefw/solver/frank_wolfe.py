"""SparseFW: mask selection for one layer by Frank-Wolfe on its convex relaxation (arXiv 2510.13713).

    minimise error(M) = ||W X - (M * W) X||_F^2 = sum(E * (E G)),  E = W * (1 - M),  G = X X^T

over masks of a given budget per row or group. The iterate M moves towards the vertex V that the linear
minimization oracle returns; R = E G is carried along, so a step costs one product, of a binary mask. An integrality
penalty, ramped up over the steps, drives M to a vertex, so that rounding loses little.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from sparsefw.kernels import cpu
from sparsefw.kernels.backend import TORCH, Backend, Terms
from sparsefw.kernels.topk_torch import as_float, infinite
from sparsefw.solver.objective import check_errors, mask_error

STEP_RULES = ("line-search", "open-loop")

# The penalty's weight grows over this share of the steps and stays constant after it.
RAMP = 0.8

# Shares of the steps after which the lower bound is computed; each costs an LMO. Without penalty the last bound is the
# largest. With penalty it peaks early (measured at 0.3), before the penalty pulls M away from the convex optimum.
CERTIFIED = (0.2, 0.3, 0.4, 1.0)


@dataclass(frozen=True)
class Problem:
    """One layer's mask-selection problem.

    Attributes:
        W: (rows, d) weight.
        G: (d, d) fp32 Gram matrix.
        saliency: (rows, d) fp32; the warm start keeps its highest entries, and it breaks ties when rounding.
        k: kept weights per row, an int or an int tensor (rows,); with `group`, per group; with `whole_matrix`, in all.
        warm: (rows, d) bool, the warm start's mask.
        fixed: (rows, d) bool, entries that every mask keeps, or None.
        group: m of n:m, else 0.
        whole_matrix: one budget, one LMO and one step size over the whole matrix (the paper's C_k).
        target_gap: (rows, d) fp32, T - W if masked weights approximate a target T: the error is that of E = T - M * W.
            None if T is W.
        damped: (d, d) fp32, G damped. Masks are chosen on it; errors and bounds are on G. None: masks on G, too.
        exact: G as `Backend.exact_operand` gives it; None: G itself.
    """

    W: Tensor
    G: Tensor
    saliency: Tensor
    k: int | Tensor
    warm: Tensor
    fixed: Tensor | None = None
    group: int = 0
    whole_matrix: bool = False
    target_gap: Tensor | None = None
    damped: Tensor | None = None
    exact: Tensor | Terms | None = None

    @property
    def exact_G(self) -> Tensor | Terms:
        """G as the operand of exact products."""
        return self.G if self.exact is None else self.exact

    @property
    def matrix(self) -> Tensor:
        """The Gram matrix on which masks are chosen."""
        return self.G if self.damped is None else self.damped


@dataclass(frozen=True)
class Solution:
    """A binary mask and its errors, (rows,) fp32 each.

    Attributes:
        mask: (rows, d) bool, True keeps a weight.
        error: error of the mask.
        error_warm_start: error of the warm start's mask.
        bound: no mask that keeps the fixed entries has a lower error; (1,) for a whole matrix.
    """

    mask: Tensor
    error: Tensor
    error_warm_start: Tensor
    bound: Tensor


@dataclass
class Iterate:
    """The state after a step: M, R, U, E fp32 (E in the product's operand type) and V bool, all (rows, d).

    `eta` (rows,) is the step size that led there and `error` (rows,) the relaxed error of M, sum(W * (1 - M) * R).
    `threshold` (rows,) is a score near which the search for the next vertex starts.
    """

    M: Tensor
    R: Tensor
    U: Tensor
    V: Tensor
    E: Tensor
    eta: Tensor
    error: Tensor
    threshold: Tensor


def make_problem(
    W: Tensor,
    G: Tensor,
    saliency: Tensor,
    k: int | Tensor,
    *,
    group: int = 0,
    whole_matrix: bool = False,
    alpha: float = 0.0,
    target_gap: Tensor | None = None,
    damped: Tensor | None = None,
    exact: Tensor | Terms | None = None,
    backend: Backend = TORCH,
) -> Problem:
    """A layer's problem with its warm start and, as the paper proposes, a part of it fixed (alpha-fixing).

    The floor(alpha k) entries of the warm start with the highest saliency are fixed, per row or, under `whole_matrix`,
    of the whole matrix. With groups, k is what a whole row keeps, so that groups of high saliency have more fixed
    entries.

    Args:
        W, G, saliency, k, group, whole_matrix, target_gap, damped, exact: see `Problem`.
        alpha: fraction of the kept entries fixed, 0 to 1.
        backend: as in `solve`.
    """
    problem = Problem(W, G, saliency, k, torch.empty(0), None, group, whole_matrix, target_gap, damped, exact)
    warm = _lmo(backend, problem, saliency)
    fixed = None
    if alpha:
        kept = k * (W.shape[1] // group) if group else k
        # The excess makes up for rounding, which may end just below a whole number: 0.29 * 100 = 28.999999999999996.
        count = (kept.double() * alpha + 1e-9).long() if isinstance(kept, Tensor) else int(kept * alpha + 1e-9)
        by_row = replace(problem, k=count, group=0)
        fixed = _lmo(backend, by_row, saliency.masked_fill(~warm, -1.0))
    return replace(problem, warm=warm, fixed=fixed)


def solve(
    problem: Problem,
    *,
    steps: int,
    step_rule: str = "line-search",
    penalty: float = 1.0,
    swaps: int = 0,
    fallback_to_warm_start: bool = True,
    backend: Backend = TORCH,
) -> Solution:
    """Choose a mask by Frank-Wolfe.

    Everything is launched before the host waits for anything, so errors are checked at the end.

    Args:
        problem: the layer, from `make_problem`.
        steps: Frank-Wolfe steps; 0 leaves the warm start, from which swaps may go on.
        step_rule: "line-search" (exact, per row) or "open-loop" (2 / (t + 2), the paper's).
        penalty: final weight theta of the integrality penalty, 0 to 1; 0 is the paper's convex problem.
        swaps: most 1-swaps per row, after rounding, see `naive.row_swaps`.
        fallback_to_warm_start: take the warm start in the rows where the rounded mask is no better.
        backend: the operations; errors are from its exact products.

    Raises:
        ValueError: the step rule is unknown, or a problem over the whole matrix has a penalty, swaps or groups.
        FloatingPointError: W or G hold NaN or Inf, or the errors overflow fp32.
    """
    if step_rule not in STEP_RULES:
        raise ValueError(f"step_rule: expected one of {', '.join(STEP_RULES)}, got {step_rule!r}")
    if problem.whole_matrix and (penalty or swaps or problem.group):
        raise ValueError("whole_matrix: one step size over the matrix has no penalty, no swaps and no groups")
    E = backend.removed(problem.W, problem.warm, problem.target_gap)
    product = backend.exact_product(E, problem.exact_G)
    error_warm_start = backend.row_errors(E, product)
    # Without damping, the iteration starts from this very product.
    R = product if problem.matrix is problem.G else None
    del E, product
    finite = [error_warm_start]
    bound = error_warm_start.new_zeros(1 if problem.whole_matrix else len(error_warm_start))
    mask = problem.warm.clone()
    certified = {max(1, round(share * steps)) - 1 for share in CERTIFIED}
    if steps:
        iterates = iterate(problem, R, steps=steps, step_rule=step_rule, penalty=penalty, backend=backend)
        for t, state in enumerate(iterates):
            if t in certified:
                bound = torch.maximum(bound, lower_bound(problem, state, backend=backend))
        mask = round_mask(problem, state.M, backend=backend)
        # An entry that is not finite stays so until the last step.
        finite.append(state.error)
        # Free its memory for the last products.
        del state, iterates
    del R
    if swaps:
        R = backend.exact_product(backend.removed(problem.W, mask, problem.target_gap), problem.matrix)
        backend.row_swaps(problem.W, problem.matrix, R, mask, swaps, group=problem.group, fixed=problem.fixed)
        del R
    error = mask_error(problem.W, mask, problem.exact_G, problem.target_gap, backend=backend)
    check_errors(torch.cat([*finite, error]))
    if fallback_to_warm_start:
        better = error < error_warm_start
        if problem.whole_matrix:
            better = (error.sum() < error_warm_start.sum()).expand_as(error)
        backend.take_rows(mask, problem.warm, ~better)
        error = torch.where(better, error, error_warm_start)
    return Solution(mask, error, error_warm_start, bound)


def iterate(
    problem: Problem, R: Tensor | None = None, *, steps: int, step_rule: str, penalty: float, backend: Backend
) -> Iterator[Iterate]:
    """The Frank-Wolfe steps from the warm start; yields the same state, changed in place, after each.

    Args:
        problem: the layer.
        R: (rows, d) fp32, the warm start's product with the matrix on which masks are chosen, which becomes part of the
            state; made here when None.
        steps, step_rule, penalty, backend: as in `solve`.
    """
    W, k, group = problem.W, problem.k, problem.group
    exact = problem.exact_G if problem.matrix is problem.G and backend.precision == "bf16" else None
    # The first of the terms is the operand, made once for all rows.
    G = exact.high if isinstance(exact, Terms) else backend.operand(problem.matrix)
    state = _start(problem, R, G, backend)
    # With one budget, the row step sees the matrix as one row. No GPU program can hold it, so torch does the step.
    operations, shape = (TORCH, (1, -1)) if problem.whole_matrix else (backend, W.shape)
    tensors = [x.view(shape) for x in (state.M, state.R, state.U, state.V, state.E)]
    fixed, target_gap = (None if x is None else x.view(shape) for x in (problem.fixed, problem.target_gap))
    diag = problem.matrix.diagonal().float().contiguous()
    multiply = backend.product_of_vertex(W, G, problem.target_gap, V=state.V, E=state.E, out=state.U)

    def step(theta: float | Tensor, next_theta: float | Tensor, eta: float | Tensor | None = None) -> None:
        multiply()
        operations.row_step(
            W.view(shape), diag, *tensors, k, group=group, fixed=fixed, target_gap=target_gap,
            theta=theta, next_theta=next_theta, eta=eta, threshold=state.threshold, out=(state.eta, state.error),
        )  # fmt: skip

    thetas = [0.0] + [penalty * min(1.0, t / (RAMP * steps)) for t in range(1, steps + 1)]
    schedule: list[tuple[float, ...]] = list(pairwise(thetas))
    if step_rule == "open-loop":
        schedule = [(*pair, 2 / (t + 2)) for t, pair in enumerate(schedule)]
    for _ in operations.repeat(step, schedule, W):
        yield state


def _start(problem: Problem, R: Tensor | None, G: Tensor, backend: Backend) -> Iterate:
    """The warm start with its product R and its first vertex. U does not hold the vertex's product yet."""
    W = problem.W
    dtype = W.dtype if problem.target_gap is None else torch.float32
    E = torch.empty_like(W, dtype=backend.operand_dtype(dtype))
    if R is None:
        R = backend.product(backend.removed(W, problem.warm, problem.target_gap, out=E), G)
    # Half of the score without penalty. Its memory becomes U.
    score = W * R
    V = _lmo(backend, problem, score, fixed=problem.fixed, positive=True)
    backend.removed(W, V, problem.target_gap, out=E)
    eta, error = W.new_empty(2, 1 if problem.whole_matrix else len(W), dtype=torch.float32).unbind()
    # The lowest score that was taken.
    threshold = torch.maximum(score, infinite(~V)).amin(1).mul_(2)
    return Iterate(as_float(problem.warm), R, score, V, E, eta, error, threshold)


def lower_bound(problem: Problem, state: Iterate, *, backend: Backend = TORCH) -> Tensor:
    """error(M) - <gradient, M - V>, V the vertex of the gradient without penalty: below the error of any mask.

        = sum(target_gap * R) + sum(W * R * (1 + M - 2 V))        R = (target_gap + W * (1 - M)) G

    Convexity of the error gives it per row, (rows,) fp32; of a problem over the whole matrix it is one number, (1,).
    If the iteration used the damped matrix, the share of the damping is first subtracted from R.
    """
    damping = None if problem.damped is None else problem.damped.diagonal() - problem.G.diagonal()
    score, constant = backend.bound_scores(problem.W, state.R, state.M, target_gap=problem.target_gap, damping=damping)
    V = _lmo(backend, problem, score, fixed=problem.fixed, positive=True)
    bound = backend.bound_sums(score, state.M, V).add_(constant)
    return bound.sum().view(1) if problem.whole_matrix else bound


def round_mask(problem: Problem, M: Tensor, *, backend: Backend = TORCH) -> Tensor:
    """The binary mask of the highest M: exactly k per row (n per group), ties by saliency, then by index.

    Fixed entries have M = 1. A feasible M has at most k such entries, so they are always among the highest.
    """
    if not problem.whole_matrix:
        return backend.round_mask(M, problem.saliency, problem.k, group=problem.group)
    mask = cpu.round_mask(M.reshape(1, -1), problem.saliency.reshape(1, -1), problem.k)
    return mask.view(M.shape)


def _lmo(
    backend: Backend, problem: Problem, score: Tensor, *, fixed: Tensor | None = None, positive: bool = False
) -> Tensor:
    """The best vertex for a score (rows, d) under the problem's budget. `solve` finds NaN in the errors."""
    if not problem.whole_matrix:
        return backend.lmo(score, problem.k, group=problem.group, fixed=fixed, positive=positive, checked=False)
    fixed = None if fixed is None else fixed.view(1, -1)
    V = cpu.lmo(score.reshape(1, -1), problem.k, fixed=fixed, positive=positive, checked=False)
    return V.view(score.shape)
