"""SparseFW: mask selection for one layer by Frank-Wolfe on its convex relaxation (arXiv 2510.13713).

    minimise error(M) = ||W X - (M * W) X||_F^2 = sum(E * (E G)),  E = W * (1 - M),  G = X X^T

over masks of a given budget per row or group. The iterate M moves towards the vertex V that the linear
minimization oracle returns; R = E G is carried along, so a step costs one product, of a binary mask. An integrality
penalty, ramped up over the steps, drives M to a vertex, so that rounding loses little.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from sparsefw.kernels import cpu
from sparsefw.kernels.topk_torch import as_float, at_least, keep
from sparsefw.kernels.vertex_products import VertexProducts

STEP_RULES = ("line-search", "open-loop")

# The penalty's weight grows over this share of the steps and is held for the rest.
RAMP = 0.8

# Shares of the steps after which the lower bound is computed; each costs an LMO of its own. Without penalty the last
# is the largest; with it the bound peaks early (measured at 0.3), before the penalty pulls M off the convex optimum.
CERTIFIED = (0.2, 0.3, 0.4, 1.0)


@dataclass(frozen=True)
class Problem:
    """One layer's mask-selection problem.

    Attributes:
        W: (rows, d) weight.
        G: (d, d) fp32 Gram matrix.
        saliency: (rows, d) fp32; the warm start keeps its highest entries, and it breaks ties when rounding.
        k: kept per row, an int or an int tensor (rows,); with `group`, per group; with `whole`, in all.
        warm: (rows, d) bool, the warm start's mask.
        fixed: (rows, d) bool, entries that every mask keeps, or None.
        group: m of n:m, else 0.
        whole: one budget, one LMO and one step size over the whole matrix (the paper's C_k).
        lacks: (rows, d) fp32, T - W where masked weights approximate others, T: the error then is that of
            E = T - M * W. None where they are the same.
        damped: (d, d) fp32, G damped, on which masks are chosen; errors and bounds are those of G. None: G.
    """

    W: Tensor
    G: Tensor
    saliency: Tensor
    k: int | Tensor
    warm: Tensor
    fixed: Tensor | None = None
    group: int = 0
    whole: bool = False
    lacks: Tensor | None = None
    damped: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The Gram matrix on which masks are chosen."""
        return self.G if self.damped is None else self.damped


@dataclass(frozen=True)
class Solution:
    """A binary mask and what is known about it; errors are one fp32 number per row.

    Attributes:
        mask: (rows, d) bool, True keeps a weight.
        error: of the mask.
        error_warm_start: of the warm start's mask.
        bound: no mask that keeps the fixed entries has a lower error.
    """

    mask: Tensor
    error: Tensor
    error_warm_start: Tensor
    bound: Tensor


@dataclass
class Iterate:
    """The state after a step: M, R, U, E fp32 (E in the product's operand type) and V bool, all (rows, d).

    `eta` (rows,) is the step size that led there and `error` (rows,) the relaxed error of M, sum(W * (1 - M) * R).
    """

    M: Tensor
    R: Tensor
    U: Tensor
    V: Tensor
    E: Tensor
    eta: Tensor
    error: Tensor


def pose(
    W: Tensor,
    G: Tensor,
    saliency: Tensor,
    k: int | Tensor,
    *,
    group: int = 0,
    whole: bool = False,
    alpha: float = 0.0,
    lacks: Tensor | None = None,
    damped: Tensor | None = None,
    ops: ModuleType = cpu,
) -> Problem:
    """A layer's problem with its warm start and, as the paper proposes, a part of it fixed (alpha-fixing).

    Per row (of the whole matrix under `whole`) the floor(alpha k) entries of the warm start with the highest saliency
    are fixed. With groups, k here is what a row keeps: fixed entries gather in the groups where saliency is high.

    Args:
        W, G, saliency, k, group, whole, lacks, damped: see `Problem`.
        alpha: fraction of the kept entries fixed, 0 to 1.
        ops: as in `solve`.
    """
    problem = Problem(W, G, saliency, k, torch.empty(0), None, group, whole, lacks, damped)
    warm = _lmo(ops, problem, saliency)
    fixed = None
    if alpha:
        kept = k * (W.shape[1] // group) if group else k
        # The tiny excess keeps products whole that floating point puts just below: 0.29 * 100 = 28.999999999999996.
        count = (kept.double() * alpha + 1e-9).long() if isinstance(kept, Tensor) else int(kept * alpha + 1e-9)
        by_row = replace(problem, k=count, group=0)
        fixed = _lmo(ops, by_row, saliency.masked_fill(~warm, -1.0))
    return replace(problem, warm=warm, fixed=fixed)


def solve(
    problem: Problem,
    *,
    steps: int,
    step_rule: str = "line-search",
    penalty: float = 1.0,
    swaps: int = 0,
    best_of: bool = True,
    precision: str = "ieee",
    ops: ModuleType = cpu,
) -> Solution:
    """Choose a mask by Frank-Wolfe.

    Everything is launched before anything is waited for: errors are checked in the end.

    Args:
        problem: the layer, from `pose`.
        steps: Frank-Wolfe steps; 0 leaves the warm start, from which swaps may go on.
        step_rule: "line-search" (exact, per row) or "open-loop" (2 / (t + 2), the paper's).
        penalty: final weight theta of the integrality penalty, 0 to 1; 0 is the paper's convex problem.
        swaps: 1-swaps per row at most, after rounding, see `cpu.row_swaps`.
        best_of: per row, fall back on the warm start where the rounded mask is no better.
        precision: of the products inside the iteration; errors are taken from products that are `exact`.
        ops: the operations, `sparsefw.kernels.cpu` or `sparsefw.kernels.triton_ops`.

    Raises:
        ValueError: unknown step rule, or a problem over the whole matrix with a penalty, swaps or groups.
        FloatingPointError: W or G hold NaN or Inf, or the errors overflow fp32.
    """
    if step_rule not in STEP_RULES:
        raise ValueError(f"step_rule: expected one of {', '.join(STEP_RULES)}, got {step_rule!r}")
    if problem.whole and (penalty or swaps or problem.group):
        raise ValueError("whole: one step size over the matrix has no penalty, no swaps and no groups")
    exactly = {"precision": exact(precision), "ops": ops}
    error_warm_start = mask_error(problem.W, problem.warm, problem.G, problem.lacks, **exactly)
    known = [error_warm_start]
    bound = error_warm_start.new_zeros(1 if problem.whole else len(error_warm_start))
    mask = problem.warm.clone()
    certified = {max(1, round(share * steps)) - 1 for share in CERTIFIED}
    options = {"step_rule": step_rule, "penalty": penalty, "precision": precision, "ops": ops}
    if steps:
        for t, state in enumerate(iterate(problem, steps=steps, **options)):
            if t in certified:
                bound = torch.maximum(bound, lower_bound(problem, state, ops=ops))
        mask = round_mask(problem, state.M, ops=ops)
        # What is not finite stays so until the last step.
        known.append(state.error)
        # Its memory is free for the last products.
        del state
    if swaps:
        R = ops.product(_removed(problem.W, mask, problem.lacks), problem.matrix, precision=exact(precision))
        ops.row_swaps(problem.W, problem.matrix, R, mask, swaps, group=problem.group, fixed=problem.fixed)
        del R
    error = mask_error(problem.W, mask, problem.G, problem.lacks, **exactly)
    _check_finite(torch.cat([*known, error]))
    if best_of:
        better = (error.sum() < error_warm_start.sum()).expand_as(error) if problem.whole else error < error_warm_start
        mask = torch.where(better[:, None], mask, problem.warm)
        error = torch.where(better, error, error_warm_start)
    return Solution(mask, error, error_warm_start, bound)


def iterate(
    problem: Problem, *, steps: int, step_rule: str, penalty: float, precision: str, ops: ModuleType
) -> Iterator[Iterate]:
    """The Frank-Wolfe steps from the warm start; yields the same state, changed in place, after each.

    Arguments as in `solve`.
    """
    W, k, group = problem.W, problem.k, problem.group
    # The row step sees the whole matrix as one row, which no program on a GPU could hold: torch does it.
    by, shape = (cpu, (1, -1)) if problem.whole else (ops, W.shape)
    G = operand(problem.matrix, precision)
    E = operand(_removed(W, problem.warm, problem.lacks), precision)
    R = ops.product(E, G, precision=precision)
    # Half of the score without penalty, in what will be U.
    score = W * R
    V = _lmo(ops, problem, score, fixed=problem.fixed, positive=True)
    E.copy_(_removed(W, V, problem.lacks))
    out = W.new_empty(2, 1 if problem.whole else len(W), dtype=torch.float32).unbind()
    state = Iterate(as_float(problem.warm), R, score, V, E, *out)
    rows = [x.view(shape) for x in (state.M, state.R, state.U, state.V, state.E)]
    held = {"fixed": problem.fixed, "lacks": problem.lacks}
    held = {name: None if x is None else x.view(shape) for name, x in held.items()}
    diag = problem.matrix.diagonal().contiguous()
    multiply = _multiplier(problem, state, G, precision, ops)

    thetas = [0.0] + [penalty * min(1.0, t / (RAMP * steps)) for t in range(1, steps + 1)]
    numbers = list(pairwise(thetas))
    if step_rule == "open-loop":
        numbers = [(*pair, 2 / (t + 2)) for t, pair in enumerate(numbers)]

    def step(theta: float | Tensor, next_theta: float | Tensor, eta: float | Tensor | None = None) -> None:
        multiply()
        how = {"theta": theta, "next_theta": next_theta, "eta": eta, "out": out}
        by.row_step(W.view(shape), diag, *rows, k, group=group, **held, **how)

    for _ in by.repeat(step, numbers, W):
        yield state


def _multiplier(problem: Problem, state: Iterate, G: Tensor, precision: str, ops: ModuleType) -> Callable[[], Tensor]:
    """What writes the product of the state's vertex to its U."""
    if ops is cpu and problem.W.device.type == "cpu":
        products = VertexProducts(problem.W, G, problem.lacks, precision=precision)
        return lambda: products(state.V, out=state.U)
    return lambda: ops.product(state.E, G, precision=precision, out=state.U)


def operand(X: Tensor, precision: str) -> Tensor:
    """X as products at this precision read it often: in half the bytes where they round it to bf16 anyway."""
    return X.bfloat16() if precision == "bf16" else X


def exact(precision: str) -> str:
    """The precision of products that are as good as fp32's: on the tensor cores, where the others are."""
    return "ieee" if precision == "ieee" else "tf32x3"


def mask_error(
    W: Tensor,
    mask: Tensor,
    G: Tensor,
    lacks: Tensor | None = None,
    *,
    precision: str = "ieee",
    ops: ModuleType = cpu,
) -> Tensor:
    """Error of a binary mask, one number per row: sum(E * (E G)) with E = lacks + W * (1 - mask), (rows,) fp32."""
    E = _removed(W, mask, lacks)
    return ops.product(E, G, precision=precision).mul_(E).sum(1)


def _removed(W: Tensor, mask: Tensor, lacks: Tensor | None) -> Tensor:
    E = keep(W, ~mask)
    return E if lacks is None else E + lacks


def lower_bound(problem: Problem, state: Iterate, *, ops: ModuleType = cpu) -> Tensor:
    """error(M) - <gradient, M - V>, V the vertex of the gradient without penalty: below the error of any mask.

        = sum(lacks * R) + sum(W * R * (1 + M - 2 V))        R = (lacks + W * (1 - M)) G

    Convexity of the error gives it per row, (rows,) fp32; of a problem over the whole matrix it is one number, (1,).
    Where the iteration saw the damped matrix, what that adds is taken out of R first.
    """
    W, R, lacks = problem.W, state.R, problem.lacks
    if problem.damped is not None:
        E = (1 - state.M).mul_(W)
        E = E if lacks is None else E.add_(lacks)
        R = R - E.mul_(problem.damped.diagonal() - problem.G.diagonal())
    score = W * R
    V = _lmo(ops, problem, score, fixed=problem.fixed, positive=True)
    share = torch.add(state.M, as_float(V), alpha=-2).add_(1)
    bound = score.mul_(share).sum(1)
    if lacks is not None:
        bound += (lacks * R).sum(1)
    return bound.sum().view(1) if problem.whole else bound


def round_mask(problem: Problem, M: Tensor, *, ops: ModuleType = cpu) -> Tensor:
    """The binary mask of the highest M: exactly k per row (n per group), ties by saliency, then by index.

    Fixed entries are at M = 1, of which a feasible M holds k at most, so they are among the highest by themselves.
    """
    units = (1, -1) if problem.whole else (-1, problem.group or M.shape[1])
    first = _lmo(ops, problem, M)
    # The lowest M that got in; entries above it are certain, entries equal to it go by saliency.
    lowest = M.add(as_float(~first), alpha=2).view(units).amin(1, keepdim=True)
    order = as_float(at_least(M.view(units), lowest)).sub_(as_float(at_least(lowest, M.view(units)))).view(M.shape)
    return _lmo(ops, problem, order.mul_(torch.finfo(torch.float32).max).add_(problem.saliency))


def _lmo(
    ops: ModuleType, problem: Problem, score: Tensor, *, fixed: Tensor | None = None, positive: bool = False
) -> Tensor:
    """The vertex of the problem's budget for a score (rows, d); NaN shows in the errors of `solve`."""
    if not problem.whole:
        return ops.lmo(score, problem.k, group=problem.group, fixed=fixed, positive=positive, checked=False)
    fixed = None if fixed is None else fixed.view(1, -1)
    V = cpu.lmo(score.reshape(1, -1), problem.k, fixed=fixed, positive=positive, checked=False)
    return V.view(score.shape)


def _check_finite(error: Tensor) -> None:
    if not error.isfinite().all():
        raise FloatingPointError("the layer's error is not finite: NaN or Inf in its weight or Gram matrix")
