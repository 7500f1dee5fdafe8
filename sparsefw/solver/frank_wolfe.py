"""Choose the mask of one layer by Frank-Wolfe on its convex relaxation: SparseFW (arXiv 2510.13713).

    minimise error(M) = ||W X - (M * W) X||_F^2 = sum(E * (E G)),  E = W * (1 - M),  G = X X^T

The minimum is over masks M with entries in [0, 1] and a budget for each row or group. In every step the linear
minimization oracle (LMO) returns a vertex V, and M moves towards it. R = E G is updated along with M, so a step costs
one product, that of a binary mask; `reference` in `kernels/step.py` is the plain form of the rest. A penalty on
entries between 0 and 1 grows over the steps: it drives M to a vertex, so that rounding loses little.

A mask may be chosen on H, which is G with damping: such a mask is better on other texts. Errors and bounds are
always measured on G. `methods.py` calls these functions, `refit.py` fits the kept weights, and `paper.py` has the steps
of the published algorithm that differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparsefw.kernels import plain
from sparsefw.kernels.backend import TORCH, Backend, Terms
from sparsefw.kernels.definitions import RowState
from sparsefw.kernels.masks import as_float

# The penalty's weight grows over this share of the steps, and is constant after them.
RAMP = 0.8

# The lower bound is computed after each of these shares of the steps. Each bound costs one LMO. Without a penalty the
# last bound is nearly always the largest. With a penalty the largest bound comes early (measured: after 0.3 of the
# steps), before the penalty pulls M away from the convex optimum.
CERTIFIED = (0.2, 0.3, 0.4, 1.0)

# Attributes of `Problem` with an entry for each row. `Problem.__getitem__` slices them.
BY_ROW = ("W", "saliency", "k", "target_gap", "support", "fixed", "warm")

# Arguments of `row_step` for each step: theta and next_theta, the penalty's weights in this step and in the next one,
# and without a line search eta, the step size.
Schedule = Sequence[tuple[float, ...]]


@dataclass(frozen=True)
class Problem:
    """Rows of weights that read the same input, with the budget of each row.

    Attributes:
        W: (rows, d) the layers' weights or, with a refit, their targets. The dtype is fp32 on a CPU, and the
            checkpoint's dtype on a GPU.
        G: (d, d) fp32 Gram matrix of the input. Errors are measured on it.
        H: (d, d) G with damping, on which masks and weights are chosen; G itself without damping. It is bf16 if it is
            only used in products that round to bf16, else fp32.
        saliency: (rows, d) fp32. The warm start keeps the entries of the highest saliency. Rounding breaks ties by it.
        k: number of kept weights in a row or, with `group`, in a group; an int, or an int64 tensor (rows,).
        group: m of n:m, else 0.
        exact: G as `Backend.exact_operand` returns it, for exact products.
        dtype: the checkpoint's dtype, to which weights are rounded in the end.
        target_gap: (rows, d) fp32 T - W, if masked weights approximate a target T other than W. Then E = T - M * W.
            None: T is W.
        support: (rows, d) bool, True where a weight may be nonzero; None: everywhere.
        fixed: (rows, d) bool, True for entries that every mask keeps; None: no entry.
        warm: (rows, d) bool, the warm start's mask, where `saliency` is not the warm start's; None: it is.
    """

    W: Tensor
    G: Tensor
    H: Tensor
    saliency: Tensor
    k: int | Tensor
    group: int
    exact: Tensor | Terms
    dtype: torch.dtype
    target_gap: Tensor | None = None
    support: Tensor | None = None
    fixed: Tensor | None = None
    warm: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Problem":
        """Select a slice of the rows."""
        by_row: dict[str, Any] = {name: x[rows] for name in BY_ROW if isinstance(x := getattr(self, name), Tensor)}
        return replace(self, **by_row)

    @property
    def damping(self) -> Tensor | None:
        """Return the damping, the diagonal of H - G, (d,) fp32; None if H is G."""
        return None if self.H is self.G else self.H.diagonal() - self.G.diagonal()


@dataclass(frozen=True)
class Choice:
    """Mask and weights that a method has chosen, with their errors, (rows,) fp32 each, on G.

    Attributes:
        mask: (rows, d) bool, True keeps a weight.
        weight: (rows, d) in the checkpoint's dtype, 0 outside the mask; None leaves the kept weights unchanged.
        error: error of the weights that are written.
        error_mask: error of the best mask that was found with unchanged weights.
        error_warm_start: error of the warm start's mask.
        bound: lower bound of the error of every mask with unchanged weights, the same budgets and the fixed entries;
            None: no bound was computed.
    """

    mask: Tensor
    weight: Tensor | None
    error: Tensor
    error_mask: Tensor
    error_warm_start: Tensor
    bound: Tensor | None


def check_errors(errors: Tensor) -> None:
    """Raise FloatingPointError unless all errors are finite."""
    if not errors.isfinite().all():
        raise FloatingPointError(
            "the layer's error is not finite: NaN or Inf in its weight or Gram matrix, or values too large for their "
            "dtype"
        )


def penalty_schedule(steps: int, penalty: float) -> Schedule:
    """Make the schedule of an exact line search in each row, with a penalty that grows to its final weight."""
    return list(pairwise([0.0] + [penalty * min(1.0, t / (RAMP * steps)) for t in range(1, steps + 1)]))


def solve(problem: Problem, warm: Tensor, schedule: Schedule, *, swaps: int = 0, backend: Backend = TORCH) -> Choice:
    """Choose a mask by Frank-Wolfe. It may be worse than the warm start's; `or_warm_start` compares the two.

    Errors are checked only at the end, so that all GPU work is launched before the host waits for a result.

    Args:
        problem: the rows.
        warm: (rows, d) bool, the warm start.
        schedule: an entry for each step. If it is empty, the mask before the swaps is the warm start.
        swaps: maximum number of 1-swaps in a row after rounding, see `kernels/swaps.py`.
        backend: the operations; its exact products measure the errors.

    Raises:
        FloatingPointError: W or G holds NaN or Inf, or the errors overflow fp32.
    """
    E = plain.removed(problem.W, warm, problem.target_gap)
    product = backend.exact_product(E, problem.exact)
    error_warm_start = plain.row_errors(E, product)
    # Without damping this product is also R at the warm start.
    R = product if problem.damping is None else None
    del E, product
    finite = [error_warm_start]
    bound = torch.zeros_like(error_warm_start)
    mask = warm.clone()
    certified = {max(1, round(share * len(schedule))) - 1 for share in CERTIFIED}
    if schedule:
        iterates = iterate(problem, warm, schedule, R, backend=backend)
        for t, state in enumerate(iterates):
            if t in certified:
                bound = torch.maximum(bound, lower_bound(problem, state, backend=backend))
        mask = backend.round_mask(state.M, problem.saliency, problem.k, group=problem.group)
        # The error of the last step is enough: NaN and Inf stay in all later steps.
        finite.append(state.error)
        # Frees the state's memory for the last products.
        del state, iterates
    del R
    if swaps:
        R = backend.exact_product(plain.removed(problem.W, mask, problem.target_gap), problem.H)
        backend.row_swaps(problem.W, problem.H, R, mask, swaps, group=problem.group, fixed=problem.fixed)
        del R
    error = backend.errors(plain.removed(problem.W, mask, problem.target_gap), problem.exact)
    check_errors(torch.cat([*finite, error]))
    return Choice(mask, None, error, error, error_warm_start, bound if schedule else None)


def or_warm_start(solution: Choice, warm: Tensor, *, backend: Backend = TORCH) -> Choice:
    """Take the warm start's mask in rows where the solution's error is not lower. The mask is changed in place."""
    better = solution.error < solution.error_warm_start
    backend.take_rows(solution.mask, warm, ~better)
    error = torch.where(better, solution.error, solution.error_warm_start)
    return replace(solution, error=error, error_mask=error)


def iterate(
    problem: Problem, warm: Tensor, schedule: Schedule, R: Tensor | None = None, *, backend: Backend = TORCH
) -> Iterator[RowState]:
    """Make the Frank-Wolfe steps from the warm start, and yield the state after each step.

    Each step changes the same state object in place.

    Args:
        problem, warm, schedule: as in `solve`.
        R: (rows, d) fp32 product E H at the warm start, which becomes part of the state; None: compute it here.
        backend: the operations.
    """
    terms = problem.exact if problem.H is problem.G and backend.precision == "bf16" else None
    # `Terms.high` is G rounded to bf16, which was made once for all rows.
    operand = terms.high if isinstance(terms, Terms) else backend.operand(problem.H)
    state = _start(problem, warm, R, operand, backend)
    multiply = backend.product_of_vertex(problem.W, operand, problem.target_gap, V=state.V, E=state.E, out=state.U)

    def step(theta: float | Tensor, next_theta: float | Tensor, eta: float | Tensor | None = None) -> None:
        multiply()
        backend.row_step(state, theta=theta, next_theta=next_theta, eta=eta)

    for _ in backend.repeat(step, schedule, problem.W):
        yield state


def _start(problem: Problem, warm: Tensor, R: Tensor | None, operand: Tensor, backend: Backend) -> RowState:
    """Make the state at the warm start, with R and the first vertex. U does not hold the vertex's product yet."""
    W, k, group, fixed = problem.W, problem.k, problem.group, problem.fixed
    dtype = W.dtype if problem.target_gap is None else torch.float32
    E = torch.empty_like(W, dtype=backend.operand_dtype(dtype))
    if R is None:
        R = backend.product(plain.removed(W, warm, problem.target_gap, out=E), operand)
    # Half of the score, without the penalty's part. The state reuses the tensor as U.
    score = W * R
    V = backend.lmo(score, k, group=group, fixed=fixed, positive=True, check_nan=False)
    plain.removed(W, V, problem.target_gap, out=E)
    eta, error = W.new_empty(2, len(W), dtype=torch.float32).unbind()
    threshold = plain.lowest(score, V).mul_(2)
    diag = problem.H.diagonal().float().contiguous()
    return RowState(W, diag, as_float(warm), R, score, V, E, k, eta, error, group, fixed, problem.target_gap, threshold)


def lower_bound(problem: Problem, state: RowState, *, backend: Backend = TORCH) -> Tensor:
    """Compute a lower bound of the error of every mask, in each row, (rows,) fp32.

        error(M) - <gradient, M - V> = sum(target_gap * R) + sum(W * R * (1 + M - 2 V))

    Here R = (target_gap + W * (1 - M)) G, and V is the best vertex for the gradient of the error, without the penalty.
    The bound holds because the error is convex. If the steps used H, the damping's part of R is subtracted first.
    """
    score, constant = plain.bound_scores(
        problem.W, state.R, state.M, target_gap=problem.target_gap, damping=problem.damping
    )
    V = backend.lmo(score, problem.k, group=problem.group, fixed=problem.fixed, positive=True, check_nan=False)
    # Rows that share a budget have one bound, since V is the best vertex for all of them together.
    return backend.spread(plain.bound_sums(score, state.M, V).add_(constant))
