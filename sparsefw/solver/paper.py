"""The steps in which the published algorithm (arXiv 2510.13713) differs from `frank_wolfe`, for `--preset paper`.

- Fixed entries (alpha-fixing): every mask keeps a share of the warm start's entries, those of the highest saliency.
- Open loop: the step sizes are 2 / (t + 2), in place of a line search.
- `layer:` patterns: the whole matrix has one budget, one LMO and one step size, as in the paper's polytope C_k.

The published algorithm always takes its rounded last iterate. So `frank_wolfe.or_warm_start` is not called.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from sparsefw.kernels import cpu
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.definitions import RowState
from sparsefw.solver.frank_wolfe import Problem, Schedule


def fixed_entries(problem: Problem, warm: Tensor, alpha: float, backend: Backend) -> Tensor:
    """Find the entries to fix, (rows, d) bool: the floor(alpha k) of highest saliency among each row's warm start.

    Under n:m, k here counts the kept weights of the whole row. So groups of high saliency get more fixed entries.
    """
    k = problem.k * (problem.W.shape[1] // problem.group) if problem.group else problem.k
    # 1e-9 corrects a product that rounding leaves just below a whole number: 0.29 * 100 = 28.999999999999996.
    count = (k.double() * alpha + 1e-9).long() if isinstance(k, Tensor) else int(k * alpha + 1e-9)
    return backend.lmo(problem.saliency.masked_fill(~warm, -1.0), count, check_nan=False)


def open_loop(schedule: Schedule) -> Schedule:
    """Replace the line search of a schedule by the paper's step sizes."""
    return [(*thetas, 2 / (t + 2)) for t, thetas in enumerate(schedule)]


def as_one_row(problem: Problem, backend: Backend) -> tuple[Problem, Backend]:
    """Replace the budgets of the rows by their sum. Returns the problem and the operations that solve it."""
    assert isinstance(problem.k, Tensor)
    return replace(problem, k=int(problem.k.sum())), WholeMatrix(backend.operations, backend.precision)


class WholeMatrix(Backend):
    """Operations that treat the whole matrix as one row. They are plain torch, as no GPU program can hold such a row.

    k counts the kept weights of the whole matrix. Products, and errors of masks, are computed by row. The step size and
    the error of an iterate are computed for the matrix and repeated for every row. Penalty, swaps and groups are not
    supported.
    """

    def lmo(self, score: Tensor, k: int | Tensor, *, fixed: Tensor | None = None, **options: Any) -> Tensor:
        """Choose the vertex that keeps the k best scores of the matrix."""
        return cpu.lmo(score.reshape(1, -1), k, fixed=_one_row(fixed), **options).view(score.shape)

    def round_mask(self, M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
        """Choose the mask that keeps the k highest entries of M in the matrix."""
        return cpu.round_mask(M.reshape(1, -1), saliency.reshape(1, -1), k).view(M.shape)

    def row_step(self, state: RowState, **numbers: Any) -> None:
        """Make one step of the whole matrix."""
        names = ("W", "M", "R", "U", "V", "E", "fixed", "target_gap")
        matrices: dict[str, Any] = {name: _one_row(getattr(state, name)) for name in names}
        row = replace(state, **matrices, eta=state.eta[:1], error=state.error[:1])
        cpu.row_step(row, **numbers)
        for of_rows in (state.eta, state.error):
            of_rows[1:] = of_rows[0]

    def repeat(self, *args: Any) -> Any:
        """Run the steps one by one. A step waits for the GPU, so it cannot be part of a CUDA graph."""
        return cpu.repeat(*args)

    def spread(self, values: Tensor) -> Tensor:
        """Give every row an equal share of the matrix's sum."""
        return values.mean().expand_as(values)


def _one_row(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.view(1, -1)
