"""Prune large language models by Frank-Wolfe on the convex relaxation of mask selection (arXiv 2510.13713)."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import platform
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# The same bits in every run. Without the first, cuBLAS may choose its algorithm by what else runs, and torch refuses
# its products where the same bits are asked for. torch looks at it before its first product on a GPU, which may be the
# caller's. It is the workspace that torch takes by itself on an H100. Without the second, sums of several GPUs may be
# made in the switch between them, in any order.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

# Stages of a block take tensors of other sizes. With this, memory of a GPU that is freed can be used for any size.
# torch reads all of these names: what the caller has set counts alone. The driver for Windows' Linux fails at it.
_set = not os.environ.keys().isdisjoint(f"PYTORCH_{kind}ALLOC_CONF" for kind in ("", "CUDA_", "HIP_"))
if not _set and "microsoft" not in platform.release():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

__version__ = "0.2.0"

__all__ = ["InputError", "PruneConfig", "PruneResult", "__version__", "prune", "solve_layer"]

if TYPE_CHECKING:
    from sparsefw.api import PruneResult, prune
    from sparsefw.errors import InputError
    from sparsefw.solver.config import PruneConfig
    from sparsefw.solver.layer import solve_layer

# The module of each name. Names are imported on first use, because torch takes a second to import.
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
    return sorted([*globals(), *_HOMES])


class _WhenQuantizersLoad(importlib.abc.MetaPathFinder):
    """Tells transformers how to load packed checkpoints, as soon as its own quantizers are imported."""

    module = "transformers.quantizers.auto"

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, whose loader imports `sparsefw.packed` at the end."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load, loader = spec.loader.exec_module, spec.loader

            def exec_module(module: ModuleType) -> None:
                load(module)
                importlib.import_module("sparsefw.packed")

            loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec


if _WhenQuantizersLoad.module in sys.modules:
    importlib.import_module("sparsefw.packed")
else:
    sys.meta_path.insert(0, _WhenQuantizersLoad())
