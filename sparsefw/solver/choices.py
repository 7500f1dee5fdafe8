"""The function of each method: it chooses masks, and weights if it changes them, for rows that read one input."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefw.finite import all_finite
from sparsefw.kernels.backend import Backend, Terms
from sparsefw.kernels.topk_torch import masked
from sparsefw.solver import frank_wolfe, sparsegpt
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.objective import check_errors, mask_error, weight_error
from sparsefw.solver.reselect import reselect
from sparsefw.solver.saliency import SALIENCIES


@dataclass(frozen=True)
class Rows:
    """Stacked rows that read the same input, and what they may keep.

    Attributes:
        W: (rows, d) weight, or with a refit the target in its place; fp32, or on a GPU the checkpoint's dtype.
        G: (d, d) fp32 Gram matrix of the input.
        saliency: (rows, d) fp32 saliency of the warm start.
        k: kept weights per row, an int or an int64 tensor (rows,); per group under n:m; in all under `whole_matrix`.
        dtype: the checkpoint's dtype, to which weights are rounded in the end.
        target_gap: (rows, d) fp32, the target minus W; None if they are the same, as they are with a refit.
        damped: (d, d) G damped by the config's `damp`, for methods that use it; fp32, or bf16 where it is an operand
            of products that round it to bf16.
        support: (rows, d) bool, weights that may be nonzero; None: all.
        exact: G as `Backend.exact_operand` gives it, made once for all rows; None: G itself.
    """

    W: Tensor
    G: Tensor
    saliency: Tensor
    k: int | Tensor
    dtype: torch.dtype
    target_gap: Tensor | None = None
    damped: Tensor | None = None
    support: Tensor | None = None
    exact: Tensor | Terms | None = None

    @property
    def exact_G(self) -> Tensor | Terms:
        """G as the operand of exact products."""
        return self.G if self.exact is None else self.exact

    def __getitem__(self, rows: slice) -> "Rows":
        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return replace(
            self,
            W=self.W[rows],
            saliency=self.saliency[rows],
            k=self.k[rows] if isinstance(self.k, Tensor) else self.k,
            target_gap=part(self.target_gap),
            support=part(self.support),
        )


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
    whole = config.whole_matrix
    problem = frank_wolfe.make_problem(
        rows.W,
        rows.G,
        rows.saliency,
        rows.k,
        group=config.pattern.group,
        whole_matrix=whole,
        alpha=config.alpha,
        target_gap=rows.target_gap,
        # Damping made no difference to a mask that a refit starts from and chooses again.
        damped=None if config.refit else rows.damped,
        exact=rows.exact,
        backend=backend,
    )
    solution = frank_wolfe.solve(
        problem,
        steps=config.steps,
        step_rule=config.step_rule,
        penalty=config.penalty,
        swaps=config.swaps,
        fallback_to_warm_start=config.fallback_to_warm_start,
        backend=backend,
    )
    bound = None
    if config.steps:
        # A whole matrix has one bound; every row gets an equal share of it.
        bound = solution.bound.expand(len(rows.W)) / (len(rows.W) if whole else 1)
    if not config.refit:
        return Choice(solution.mask, None, solution.error, solution.error, solution.error_warm_start, bound)
    assert rows.damped is not None
    fit = reselect(
        replace(problem, G=rows.damped),
        solution.mask,
        steps=config.steps,
        penalty=config.penalty,
        refit_steps=config.refit,
        rounds=config.rounds,
        support=rows.support,
        backend=backend,
    )
    written = fit.Z.to(rows.dtype)
    error = weight_error(rows.W, written, rows.exact_G, backend=backend)
    # Compared row by row, with the weights as they are written: no refit makes a row worse.
    better = error < solution.error
    mask = solution.mask
    backend.take_rows(mask, fit.mask, better)
    backend.take_rows(written, masked(rows.W.to(rows.dtype), mask), ~better)
    error = torch.where(better, error, solution.error)
    return Choice(mask, written, error, solution.error, solution.error_warm_start, bound)


def choose_saliency(rows: Rows, config: PruneConfig, backend: Backend) -> Choice:
    """The warm start's mask."""
    _check_finite(rows)
    mask = backend.lmo(rows.saliency, rows.k, group=config.pattern.group)
    error = mask_error(rows.W, mask, rows.exact_G, backend=backend)
    check_errors(error)
    return Choice(mask, None, error, error, error, None)


def _check_finite(rows: Rows) -> None:
    if not (all_finite(rows.W) & all_finite(rows.G)):
        raise FloatingPointError("NaN or Inf in the layer's weight or Gram matrix")


# Chooses mask and weights, (rows, d) each: called with rows and config.
PruneRows = Callable[[Rows, PruneConfig], tuple[Tensor, Tensor]]


def choose_weights(prune: PruneRows) -> Callable[[Rows, PruneConfig, Backend], Choice]:
    """The `choose` of a method that chooses mask and weights at once."""

    def choose(rows: Rows, config: PruneConfig, backend: Backend) -> Choice:
        _check_finite(rows)
        # Only its error is reported.
        warm = backend.lmo(rows.saliency, rows.k, group=config.pattern.group)
        mask, Z = prune(rows, config)
        written = Z.to(rows.dtype)
        error = weight_error(rows.W, written, rows.exact_G, backend=backend)
        error_mask, error_warm_start = (mask_error(rows.W, m, rows.exact_G, backend=backend) for m in (mask, warm))
        check_errors(torch.stack([error, error_mask, error_warm_start]))
        return Choice(mask, written, error, error_mask, error_warm_start, None)

    return choose


def _sparsegpt(rows: Rows, config: PruneConfig) -> tuple[Tensor, Tensor]:
    return sparsegpt.prune(rows.W, rows.G, config.pattern, support=rows.support)


# The function of each method in METHODS, called with rows, config and backend.
CHOOSE: dict[str, Callable[[Rows, PruneConfig, Backend], Choice]] = {
    "sparsefw": choose_frank_wolfe,
    "sparsegpt": choose_weights(_sparsegpt),
    **dict.fromkeys(SALIENCIES, choose_saliency),
}
