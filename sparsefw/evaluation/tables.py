"""The lines that the command prints at its end."""

from collections.abc import Iterator

from sparsefw.evaluation.measured import Evaluation
from sparsefw.report import amount
from sparsefw.report.task_table import lines, rows


def summary(evaluation: Evaluation) -> Iterator[str]:
    """A table of all that was measured, and what its texts are."""
    yield from lines([*rows(evaluation.tasks, evaluation.texts)], evaluation.models, evaluation.against)
    for text in evaluation.texts:
        yield f"perplexity: {amount(text.source, text.windows, text.seqlen)} of {text.source}"
