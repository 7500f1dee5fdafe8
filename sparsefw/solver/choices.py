"""Choices: the function of each method, which chooses masks, and weights if it changes them, for rows of one input."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsefw.finite import all_finite
from sparsefw.kernels.backend import Backend, Terms
from sparsefw.kernels.topk_torch import masked
from sparsefw.solver import frank_wolfe, paper
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.frank_wolfe import Problem
from sparsefw.solver.methods import SALIENCIES, sparsegpt
from sparsefw.solver.objective import check_errors, mask_error, weight_error
from sparsefw.solver.refit import reselect


@dataclass(frozen=True)
class Rows:
    """Stacked rows that read the same input, and what they may keep.

    Attributes:
        start: (rows, d) the weights that pruning starts from: the layers' own or, with a refit, their targets; fp32,
            or on a GPU the checkpoint's dtype.
        G: (d, d) fp32 Gram matrix of the input.
        saliency: (rows, d) fp32 saliency of the warm start.
        k: kept weights per row, an int or an int64 tensor (rows,); per group under n:m; of a whole matrix in all.
        dtype: the checkpoint's dtype, to which weights are rounded in the end.
        exact: G as `Backend.exact_operand` gives it, made once for all rows.
        H: (d, d) G damped by the config's `damp`, for methods that use it; fp32, or bf16 where it is only an operand of
            products that round it to bf16.
        target_gap: (rows, d) fp32, the target minus `start`; None if they are the same, as they are with a refit.
        support: (rows, d) bool, weights that may be nonzero; None: all.
    """

    start: Tensor
    G: Tensor
    saliency: Tensor
    k: int | Tensor
    dtype: torch.dtype
    exact: Tensor | Terms
    H: Tensor | None = None
    target_gap: Tensor | None = None
    support: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Rows":
        names = ("start", "saliency", "k", "target_gap", "support")
        by_row: dict[str, Any] = {name: x[rows] for name in names if isinstance(x := getattr(self, name), Tensor)}
        return replace(self, **by_row)


@dataclass(frozen=True)
class Choice:
    """The mask and weights that a method chose, with errors (rows,) fp32 on the Gram matrix without damping.

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


def choose_frank_wolfe(rows: Rows, config: PruneConfig, backend: Backend) -> Choice:
    """Masks by Frank-Wolfe, and with `config.refit` weights as well."""
    if not config.steps:
        # The errors of steps depend on all weights, that of the warm start's mask only on removed ones.
        _check_finite(rows)
    if config.whole_matrix:
        backend = paper.WholeMatrix(backend.operations, backend.precision)
    assert rows.H is not None
    # Damping made no difference to a mask that a refit starts from and chooses again.
    H = rows.G if config.refit else rows.H
    damping = None if H is rows.G else H.diagonal() - rows.G.diagonal()
    # NaN shows in the errors of the solution.
    warm = backend.lmo(rows.saliency, rows.k, group=config.pattern.group, checked=False)
    problem = Problem(
        rows.start, H, rows.saliency, rows.k, warm, config.pattern.group,
        target_gap=rows.target_gap, damping=damping, exact=rows.exact,
    )  # fmt: skip
    if config.alpha:
        problem = replace(problem, fixed=paper.fixed_entries(problem, config.alpha, backend))
    schedule = frank_wolfe.line_search(config.steps, config.penalty)
    if config.step_rule == "open-loop":
        schedule = paper.open_loop(schedule)
    solution = frank_wolfe.solve(problem, schedule, swaps=config.swaps, backend=backend)
    if config.fallback_to_warm_start:
        solution = frank_wolfe.or_warm_start(solution, problem.warm, backend=backend)
    mask, bound = solution.mask, solution.bound if schedule else None
    if not config.refit:
        return Choice(mask, None, solution.error, solution.error, solution.error_warm_start, bound)
    fit = reselect(
        replace(problem, H=rows.H, damping=None),
        mask,
        steps=config.steps,
        penalty=config.penalty,
        refit_steps=config.refit,
        rounds=config.rounds,
        support=rows.support,
        backend=backend,
    )
    written = fit.Z.to(rows.dtype)
    error = weight_error(rows.start, written, rows.exact, backend=backend)
    # Compared row by row, with the weights as they are written: no refit makes a row worse.
    better = error < solution.error
    backend.take_rows(mask, fit.mask, better)
    backend.take_rows(written, masked(rows.start.to(rows.dtype), mask), ~better)
    error = torch.where(better, error, solution.error)
    return Choice(mask, written, error, solution.error, solution.error_warm_start, bound)


def choose_saliency(rows: Rows, config: PruneConfig, backend: Backend) -> Choice:
    """The warm start's mask."""
    _check_finite(rows)
    mask = backend.lmo(rows.saliency, rows.k, group=config.pattern.group)
    error = mask_error(rows.start, mask, rows.exact, backend=backend)
    check_errors(error)
    return Choice(mask, None, error, error, error, None)


def choose_weights(
    prune: Callable[[Rows, PruneConfig], tuple[Tensor, Tensor]],
) -> Callable[[Rows, PruneConfig, Backend], Choice]:
    """The `choose` of a method whose `prune` gives mask and weights, (rows, d) each, at once."""

    def choose(rows: Rows, config: PruneConfig, backend: Backend) -> Choice:
        _check_finite(rows)
        # Only its error is reported.
        warm = backend.lmo(rows.saliency, rows.k, group=config.pattern.group)
        mask, Z = prune(rows, config)
        written = Z.to(rows.dtype)
        error = weight_error(rows.start, written, rows.exact, backend=backend)
        error_mask, error_warm_start = (mask_error(rows.start, m, rows.exact, backend=backend) for m in (mask, warm))
        check_errors(torch.stack([error, error_mask, error_warm_start]))
        return Choice(mask, written, error, error_mask, error_warm_start, None)

    return choose


def _check_finite(rows: Rows) -> None:
    if not (all_finite(rows.start) & all_finite(rows.G)):
        raise FloatingPointError("NaN or Inf in the layer's weight or Gram matrix")


# The function of each method in METHODS, called with rows, config and backend.
CHOOSE: dict[str, Callable[[Rows, PruneConfig, Backend], Choice]] = {
    "sparsefw": choose_frank_wolfe,
    "sparsegpt": choose_weights(
        lambda rows, config: sparsegpt(rows.start, rows.G, config.pattern, support=rows.support)
    ),
    **dict.fromkeys(SALIENCIES, choose_saliency),
}
