"""The table of an evaluation: a line for each model and metric, with standard errors and differences."""

from collections.abc import Iterator, Mapping

from sparsefw.errors import printable
from sparsefw.evaluation.metrics import Difference, Evaluation, Measurement
from sparsefw.report import amount

_LAYOUT = "{:28} {:18} {:>7} {:>5} {:>20} {:>20} {:>7}  {}"


def lines(evaluation: Evaluation) -> Iterator[str]:
    """All texts, all metrics of tasks, and the average over tasks."""
    yield _LAYOUT.format("task", "metric", "n", "shots", "value", "difference", "errors", "model")
    for text in evaluation.texts:
        yield from _rows([text.source, "perplexity", text.windows, ""], text.results)
    for task in evaluation.tasks:
        metric = task.metric if task.filter == "none" else f"{task.metric} ({task.filter})"
        yield from _rows([task.task, metric, task.documents, task.shots], task.results)
    averaged = [task for task in evaluation.tasks if task.averaged]
    yield from _rows(["average", "acc_norm or acc", len(averaged), ""], evaluation.average)
    yield ""
    yield "n: documents of a task, windows of a text, tasks of the average; ±: standard error"
    if evaluation.against is not None:
        yield (
            f"difference: from {printable(evaluation.against)}, the same documents in pairs; errors: how many of its "
            "standard errors"
        )
    for text in evaluation.texts:
        yield f"perplexity: {amount(text.source, text.windows, text.seqlen)} of {printable(text.source)}"


def _rows(cells: list[object], results: Mapping[str, Measurement]) -> Iterator[str]:
    for n, (name, measured) in enumerate(results.items()):
        difference = measured.difference
        errors = f"{difference.value / difference.stderr:+.1f}" if difference and difference.stderr else ""
        numbers = [_number(measured), "" if difference is None else _number(difference), errors]
        yield _LAYOUT.format(*(printable(str(x)) if n == 0 else "" for x in cells), *numbers, printable(name))


def _number(measured: Measurement | Difference) -> str:
    """A value with its standard error."""
    sign = "+" if isinstance(measured, Difference) and measured.value >= 0 else ""
    error = "" if measured.stderr is None else f" ± {_digits(measured.stderr)}"
    return f"{sign}{_digits(measured.value)}{error}"


def _digits(value: float) -> str:
    """A value, with the digits that a standard error of some thousands of documents leaves."""
    if abs(value) >= 1e6:
        return f"{value:.3e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.3f}"
