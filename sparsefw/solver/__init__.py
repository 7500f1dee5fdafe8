"""Chooses which weights of a layer to keep, and their values; for one layer, or several that read the same input."""

from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import LayerResult, prune_layers, solve_layer
from sparsefw.solver.methods import METHODS
from sparsefw.solver.patterns import Pattern

__all__ = ["METHODS", "LayerResult", "Pattern", "PruneConfig", "prune_layers", "solve_layer"]
