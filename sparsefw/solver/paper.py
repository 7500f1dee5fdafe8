"""Follow the published algorithm (arXiv 2510.13713) where it differs: `--preset paper` and the flags that it sets.

- Fixed entries (alpha-fixing): a share of the warm start's entries, the most salient ones, is in every mask.
- Open loop: step sizes of 2 / (t + 2) in place of a line search.
- `layer:` patterns: one budget, one LMO and one step size over the whole matrix, the paper's C_k.

Its last iterate is rounded, and taken where the warm start is better, too: `frank_wolfe.or_warm_start` is left out.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from sparsefw.kernels import cpu
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.definitions import RowState
from sparsefw.solver.frank_wolfe import Problem, Schedule


def fixed_entries(problem: Problem, warm: Tensor, alpha: float, backend: Backend) -> Tensor:
    """Fix the floor(alpha k) entries of the warm start with the highest saliency in every row, (rows, d) bool.

    With groups, k is what a whole row keeps, so that groups of high saliency have more fixed entries.
    """
    k = problem.k * (problem.W.shape[1] // problem.group) if problem.group else problem.k
    # The excess makes up for rounding, which may end just below a whole number: 0.29 * 100 = 28.999999999999996.
    count = (k.double() * alpha + 1e-9).long() if isinstance(k, Tensor) else int(k * alpha + 1e-9)
    fixed: Tensor = backend.lmo(problem.saliency.masked_fill(~warm, -1.0), count, checked=False)
    return fixed


def open_loop(schedule: Schedule) -> Schedule:
    """Replace the line search of a schedule by the paper's step sizes."""
    return [(*thetas, 2 / (t + 2)) for t, thetas in enumerate(schedule)]


def as_one_row(problem: Problem, backend: Backend) -> tuple[Problem, Backend]:
    """Give all rows one budget, the sum of theirs. Returns the problem, and the operations that solve it."""
    assert isinstance(problem.k, Tensor)
    return replace(problem, k=int(problem.k.sum())), WholeMatrix(backend.operations, backend.precision)


class WholeMatrix(Backend):
    """Choose from the whole matrix as if it was one row, in plain torch: no GPU program can hold it.

    A problem's k is what the matrix keeps in all. Products and errors are per row as ever; the step size and the error
    of an iterate are the matrix's in every row. A problem has no penalty, no swaps and no groups.
    """

    def lmo(self, score: Tensor, k: int, *, fixed: Tensor | None = None, group: int = 0, **options: Any) -> Tensor:
        """Vertex that keeps the k best scores of the matrix."""
        return cpu.lmo(score.reshape(1, -1), k, fixed=_one_row(fixed), **options).view(score.shape)

    def round_mask(self, M: Tensor, saliency: Tensor, k: int, *, group: int = 0) -> Tensor:
        """Mask of the k highest M of the matrix."""
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
        """Go step by step, since a step waits for the GPU."""
        return cpu.repeat(*args)

    def bound_scores(self, *args: Tensor, **options: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the scores, and for every row an equal share of the matrix's constant."""
        score, constant = self.operations.bound_scores(*args, **options)
        return score, _share(constant)

    def bound_sums(self, *args: Tensor) -> Tensor:
        """Give every row an equal share of the matrix's sum."""
        return _share(self.operations.bound_sums(*args))


def _one_row(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.view(1, -1)


def _share(sums: Tensor) -> Tensor:
    return (sums.sum() / len(sums)).repeat(len(sums))
