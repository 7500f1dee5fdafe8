"""Evaluate checkpoints on texts and tasks, with one block in memory at a time.

Importing this package registers the model "sparsefw" with lm-evaluation-harness. The rest of the harness is imported
only to run tasks.
"""

from importlib.util import find_spec

if find_spec("lm_eval"):
    # This imports no model. The harness lists its own models only where there are no others yet.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    model_registry.register("sparsefw", target=f"{__name__}.harness:StreamedLM")
