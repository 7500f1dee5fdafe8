"""Perplexity and tasks of checkpoints, with one block in memory at a time.

lm-evaluation-harness knows the model "sparsefw" once this package is imported. The harness itself is imported only for
tasks.
"""

from importlib.util import find_spec

from sparsefw.extras.evaluation.run import evaluate

__all__ = ["evaluate"]

if find_spec("lm_eval"):
    # Imports only the harness's list of names.
    from lm_eval.api.registry import model_registry

    model_registry.register("sparsefw", target=f"{__name__}.harness:StreamedLM")
