"""How likely a model finds texts: perplexity and tasks, for models of which one block is in memory at a time.

lm-evaluation-harness knows the model "sparsefw" once this package is imported. The harness itself is imported only for
what needs it, which raises InputError where it is not installed.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sparsefw.errors import InputError
from sparsefw.evaluation.request import Request, Score, request_of

if TYPE_CHECKING:
    from sparsefw.evaluation.harness import PAPER, Questions, questions, results
    from sparsefw.evaluation.job import EvaluateResult, evaluate
    from sparsefw.evaluation.language_model import StreamedLM

__all__ = [
    "PAPER",
    "EvaluateResult",
    "Questions",
    "Request",
    "Score",
    "StreamedLM",
    "evaluate",
    "questions",
    "request_of",
    "results",
]

_HARNESS = "lm_eval"
# Names that are imported on first use, by the module that each is in; and the modules that need the harness.
_MODULES = {
    "harness": ["PAPER", "Questions", "questions", "results"],
    "job": ["EvaluateResult", "evaluate"],
    "language_model": ["StreamedLM"],
}
_NEED_HARNESS = ("harness", "language_model")


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if not module:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if module in _NEED_HARNESS and not find_spec(_HARNESS):
        raise InputError("lm-evaluation-harness is not installed; pip install -e '.[eval]' brings it")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _register() -> None:
    """Have the harness know the model by its name; imports the harness's list of names, and no more."""
    from lm_eval.api.registry import model_registry

    model_registry.register("sparsefw", target=f"{__name__}.language_model:StreamedLM")


if find_spec(_HARNESS):
    _register()
