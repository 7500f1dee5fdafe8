"""The baselines as methods of the product: what `--method` takes beside its own in the processes of the study."""

import baselines
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.kernels.backend import Backend
from sparsefw.solver import METHODS, PruneConfig
from sparsefw.solver.choices import CHOOSE, Choice, Rows, choose_weights
from sparsefw.solver.methods import Method
from sparsefw.solver.objective import mask_error


def _one_budget(rows: Rows, config: PruneConfig) -> int:
    if isinstance(rows.k, Tensor):
        raise InputError(f"--sparsity {config.sparsity}: this method takes the same budget in every row only")
    return rows.k


def _admm(rows: Rows, config: PruneConfig) -> tuple[Tensor, Tensor]:
    """ADMM, which has a damping of its own."""
    return baselines.admm(rows.start, rows.G, _one_budget(rows, config), group=config.pattern.group)


def _one_swaps(rows: Rows, config: PruneConfig, backend: Backend) -> Choice:
    """Best 1-swaps from the warm start."""
    group = config.pattern.group
    warm = backend.lmo(rows.saliency, _one_budget(rows, config), group=group)
    mask = baselines.one_swaps(rows.start, rows.G, warm, group=group)
    error, before = (mask_error(rows.start, m, rows.G, backend=backend) for m in (mask, warm))
    return Choice(mask, None, error, error, before, None)


# ADMM factors G in every call, so rows are not solved in chunks.
BASELINES = {
    "one-swaps": Method(saliency="wanda"),
    "admm": Method(saliency="wanda", rows_independent=False),
}
CHOOSE_BASELINES = {
    "one-swaps": _one_swaps,
    "admm": choose_weights(_admm),
}


def register() -> None:
    """Add the baselines to the methods of this process."""
    METHODS.update(BASELINES)
    CHOOSE.update(CHOOSE_BASELINES)
