"""Chooses which weights of a layer to keep, and their values; for one layer, or several that read the same input."""

from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import LayerResult, prune_layers, solve_layer
from sparsefw.solver.methods import METHODS
from sparsefw.solver.patterns import Pattern
from sparsefw.solver.stack import cost_of_solve, rows_by_rank

__all__ = [
    "METHODS",
    "LayerResult",
    "Pattern",
    "PruneConfig",
    "cost_of_solve",
    "prune_layers",
    "rows_by_rank",
    "solve_layer",
]
