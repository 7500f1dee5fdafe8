"""Chooses which weights of a layer to keep, and their values; for one layer, or several that read the same input."""

from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import solve_layer

__all__ = ["PruneConfig", "solve_layer"]
