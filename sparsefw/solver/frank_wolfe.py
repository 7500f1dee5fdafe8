"""SparseFW: mask selection for one layer by Frank-Wolfe on its convex relaxation (arXiv 2510.13713).

    minimise error(M) = ||W X - (M * W) X||_F^2 = sum(E * (E G)),  E = W * (1 - M),  G = X X^T

over masks with a budget per row or group. The iterate M moves towards the vertex V that the linear
minimization oracle returns; R = E G is carried along, so a step costs one product, of a binary mask. An integrality
penalty, ramped up over the steps, drives M to a vertex, so that rounding loses little.

Masks may be chosen on H, which is G with damping, so that what is chosen on one text holds on others. Errors and bounds
are always on G. methods.py says what a run does with this, refit.py fits the kept weights, and paper.py has what the
published algorithm does otherwise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend, Terms
from sparsefw.kernels.definitions import RowState
from sparsefw.kernels.topk_torch import as_float, infinite

# The penalty's weight grows over this share of the steps and stays constant after it.
RAMP = 0.8

# Shares of the steps after which the lower bound is computed; each costs an LMO. Without penalty the last bound is the
# largest. With penalty it peaks early (measured at 0.3), before the penalty pulls M away from the convex optimum.
CERTIFIED = (0.2, 0.3, 0.4, 1.0)

# The attributes of a problem that have a row for each of its rows.
BY_ROW = ("W", "saliency", "k", "target_gap", "support", "fixed")

# For each step the arguments of `row_step`: theta, next_theta and, if there is no line search, eta.
Schedule = Sequence[tuple[float, ...]]


@dataclass(frozen=True)
class Problem:
    """Weights that read the same input, row by row, with what each row may keep.

    Attributes:
        W: (rows, d) the weights: the layers' own or, with a refit, their targets; fp32, or on a GPU the checkpoint's
            dtype.
        G: (d, d) fp32 Gram matrix of the input, on which errors are.
        H: (d, d) G with damping, on which masks and weights are chosen; G itself where nothing is damped. It is bf16
            where only products that round it to bf16 read it.
        saliency: (rows, d) fp32; the warm start keeps its highest entries, and it breaks ties when rounding.
        k: kept weights per row, an int or an int64 tensor (rows,); with `group`, per group.
        group: m of n:m, else 0.
        exact: G as `Backend.exact_operand` gives it, made once for all rows.
        dtype: the checkpoint's dtype, to which weights are rounded in the end.
        target_gap: (rows, d) fp32, T - W if masked weights approximate a target T: the error is that of E = T - M * W.
            None if T is W.
        support: (rows, d) bool, weights that may be nonzero; None: all.
        fixed: (rows, d) bool, entries that every mask keeps, or None.
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

    def __getitem__(self, rows: slice) -> "Problem":
        """Select some of the rows."""
        by_row: dict[str, Any] = {name: x[rows] for name in BY_ROW if isinstance(x := getattr(self, name), Tensor)}
        return replace(self, **by_row)

    @property
    def damping(self) -> Tensor | None:
        """Damping: the diagonal of H - G, (d,) fp32; None where H is G."""
        return None if self.H is self.G else self.H.diagonal() - self.G.diagonal()


@dataclass(frozen=True)
class Choice:
    """Mask and weights that a method chose, with errors (rows,) fp32 on the Gram matrix without damping.

    Attributes:
        mask: (rows, d) bool, True keeps a weight.
        weight: (rows, d) in the checkpoint's dtype, 0 outside the mask; None leaves the kept weights as they are.
        error: error of the weights that are written.
        error_mask: error of the best mask found for unchanged weights; equals `error` without a refit.
        error_warm_start: error of the warm start's mask.
        bound: no mask of unchanged weights that keeps the fixed entries has a lower error; None if not known.
    """

    mask: Tensor
    weight: Tensor | None
    error: Tensor
    error_mask: Tensor
    error_warm_start: Tensor
    bound: Tensor | None


def mask_error(
    W: Tensor, mask: Tensor, G: Tensor | Terms, target_gap: Tensor | None = None, *, backend: Backend = TORCH
) -> Tensor:
    """Error of a binary mask of unchanged weights, one number per row, (rows,) fp32; G as in `Backend.errors`."""
    return backend.errors(backend.removed(W, mask, target_gap), G)


def check_errors(errors: Tensor) -> None:
    """Raise FloatingPointError unless all errors, of any shape, are finite."""
    if not errors.isfinite().all():
        raise FloatingPointError(
            "the layer's error is not finite: NaN or Inf in its weight or Gram matrix, or numbers too large for their "
            "dtype"
        )


def line_search(steps: int, penalty: float) -> Schedule:
    """Make a schedule of steps with exact line search, per row, and a penalty that grows to its final weight."""
    return list(pairwise([0.0] + [penalty * min(1.0, t / (RAMP * steps)) for t in range(1, steps + 1)]))


def solve(problem: Problem, warm: Tensor, schedule: Schedule, *, swaps: int = 0, backend: Backend = TORCH) -> Choice:
    """Choose a mask by Frank-Wolfe; in some rows the warm start's may be better, see `or_warm_start`.

    Everything is launched before the host waits for anything, so errors are checked at the end.

    Args:
        problem: the rows.
        warm: (rows, d) bool, the warm start.
        schedule: one entry a step. An empty one leaves the warm start, from which swaps may go on.
        swaps: most 1-swaps per row, after rounding, see `kernels/swaps.py`.
        backend: the operations; errors are from its exact products.

    Raises:
        FloatingPointError: W or G hold NaN or Inf, or the errors overflow fp32.
    """
    E = backend.removed(problem.W, warm, problem.target_gap)
    product = backend.exact_product(E, problem.exact)
    error_warm_start = backend.row_errors(E, product)
    # Without damping, the iteration starts from this very product.
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
        # An entry that is not finite stays so until the last step.
        finite.append(state.error)
        # Free its memory for the last products.
        del state, iterates
    del R
    if swaps:
        R = backend.exact_product(backend.removed(problem.W, mask, problem.target_gap), problem.H)
        backend.row_swaps(problem.W, problem.H, R, mask, swaps, group=problem.group, fixed=problem.fixed)
        del R
    error = mask_error(problem.W, mask, problem.exact, problem.target_gap, backend=backend)
    check_errors(torch.cat([*finite, error]))
    return Choice(mask, None, error, error, error_warm_start, bound if schedule else None)


def or_warm_start(solution: Choice, warm: Tensor, *, backend: Backend = TORCH) -> Choice:
    """Take the warm start's mask in the rows where the solution is no better; its mask is changed in place."""
    better = solution.error < solution.error_warm_start
    backend.take_rows(solution.mask, warm, ~better)
    error = torch.where(better, solution.error, solution.error_warm_start)
    return replace(solution, error=error, error_mask=error)


def iterate(
    problem: Problem, warm: Tensor, schedule: Schedule, R: Tensor | None = None, *, backend: Backend = TORCH
) -> Iterator[RowState]:
    """Make the Frank-Wolfe steps from the warm start; yields the same state, changed in place, after each.

    Args:
        problem, warm, schedule: as in `solve`.
        R: (rows, d) fp32, the warm start's product with H, which becomes part of the state; made here when None.
        backend: the operations.
    """
    terms = problem.exact if problem.H is problem.G and backend.precision == "bf16" else None
    # The first of the terms is the operand, made once for all rows.
    H = terms.high if isinstance(terms, Terms) else backend.operand(problem.H)
    state = _start(problem, warm, R, H, backend)
    multiply = backend.product_of_vertex(problem.W, H, problem.target_gap, V=state.V, E=state.E, out=state.U)

    def step(theta: float | Tensor, next_theta: float | Tensor, eta: float | Tensor | None = None) -> None:
        multiply()
        backend.row_step(state, theta=theta, next_theta=next_theta, eta=eta)

    for _ in backend.repeat(step, schedule, problem.W):
        yield state


def _start(problem: Problem, warm: Tensor, R: Tensor | None, H: Tensor, backend: Backend) -> RowState:
    """Make the warm start's state, with its product R and its first vertex. U is not the vertex's product yet."""
    W, k, group, fixed = problem.W, problem.k, problem.group, problem.fixed
    dtype = W.dtype if problem.target_gap is None else torch.float32
    E = torch.empty_like(W, dtype=backend.operand_dtype(dtype))
    if R is None:
        R = backend.product(backend.removed(W, warm, problem.target_gap, out=E), H)
    # Half of the score without penalty. Its memory becomes U.
    score = W * R
    V = backend.lmo(score, k, group=group, fixed=fixed, positive=True, checked=False)
    backend.removed(W, V, problem.target_gap, out=E)
    eta, error = W.new_empty(2, len(W), dtype=torch.float32).unbind()
    # The lowest score that was taken.
    threshold = torch.maximum(score, infinite(~V)).amin(1).mul_(2)
    diag = problem.H.diagonal().float().contiguous()
    return RowState(W, diag, as_float(warm), R, score, V, E, k, eta, error, group, fixed, problem.target_gap, threshold)


def lower_bound(problem: Problem, state: RowState, *, backend: Backend = TORCH) -> Tensor:
    """Compute error(M) - <gradient, M - V>, V the vertex of the gradient without penalty: no mask has a lower error.

        = sum(target_gap * R) + sum(W * R * (1 + M - 2 V))        R = (target_gap + W * (1 - M)) G

    Convexity of the error gives it per row, (rows,) fp32. If the iteration used a damped matrix, the share of the
    damping is first subtracted from R.
    """
    score, constant = backend.bound_scores(
        problem.W, state.R, state.M, target_gap=problem.target_gap, damping=problem.damping
    )
    V = backend.lmo(score, problem.k, group=problem.group, fixed=problem.fixed, positive=True, checked=False)
    return backend.bound_sums(score, state.M, V).add_(constant)
