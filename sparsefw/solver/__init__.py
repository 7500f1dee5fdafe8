"""Which weights of a layer to keep, and what to make of them: one layer, or several that read the same input."""

from sparsefw.solver.layer import LayerResult, prune_layers
from sparsefw.solver.methods import METHODS
from sparsefw.solver.patterns import Pattern

__all__ = [
    "METHODS",
    "LayerResult",
    "Pattern",
    "prune_layers",
]
