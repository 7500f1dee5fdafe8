"""Prune large language models by Frank-Wolfe on the convex relaxation of mask selection (arXiv 2510.13713)."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

__all__ = ["InputError", "PruneConfig", "PruneResult", "__version__", "prune", "solve_layer"]

if TYPE_CHECKING:
    from sparsefw.api import PruneResult, prune
    from sparsefw.errors import InputError
    from sparsefw.solver.config import PruneConfig
    from sparsefw.solver.layer import solve_layer

# The module of each public name. A name is imported on first use, because importing torch takes a second.
_HOMES = {
    "InputError": "sparsefw.errors",
    "PruneConfig": "sparsefw.solver.config",
    "PruneResult": "sparsefw.api",
    "prune": "sparsefw.api",
    "solve_layer": "sparsefw.solver.layer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
