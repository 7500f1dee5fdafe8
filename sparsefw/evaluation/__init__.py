"""How likely a model finds texts: perplexity and tasks, for models of which one block is in memory at a time.

lm-evaluation-harness knows the model "sparsefw" once this package is imported. The harness itself is imported only for
what needs it.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sparsefw.evaluation.metrics import Evaluation
from sparsefw.evaluation.run import check_installed, evaluate

if TYPE_CHECKING:
    from sparsefw.evaluation.harness import StreamedLM

__all__ = ["Evaluation", "StreamedLM", "check_installed", "evaluate"]


def __getattr__(name: str) -> Any:
    if name != "StreamedLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_installed()
    from sparsefw.evaluation.harness import StreamedLM

    return StreamedLM


if find_spec("lm_eval"):
    # Imports the harness's list of names, and no more.
    from lm_eval.api.registry import model_registry

    model_registry.register("sparsefw", target=f"{__name__}.harness:StreamedLM")
