"""Tasks and texts as a table: a row for each metric, with its standard errors, of one model or of several."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sparsefw.errors import printable
from sparsefw.report.tasks import Difference, Measurement, TaskRecord, TextRecord, average_of

_COLUMNS = (("task", "<28"), ("metric", "<18"), ("n", ">7"), ("shots", ">5"))
COLUMNS = tuple(name for name, _ in _COLUMNS)
# Widths of a measurement, and of a number of standard errors.
_MEASURED, _ERRORS = 20, 7

# A column has room for a name of so many characters; longer names are told below the table.
LONGEST_NAME = 18


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        cells: a text for each of COLUMNS.
        results: the metric by model.
    """

    cells: tuple[str, str, str, str]
    results: dict[str, Measurement]


def rows(tasks: Sequence[TaskRecord], texts: Sequence[TextRecord] = ()) -> Iterator[Row]:
    """All texts, all metrics of tasks, and the average."""
    for text in texts:
        yield Row((text.source, "perplexity", str(text.windows), ""), text.results)
    for task in tasks:
        metric = task.metric if task.filter == "none" else f"{task.metric} ({task.filter})"
        yield Row((task.task, metric, str(task.documents), str(task.shots)), task.results)
    if average := average_of(tasks):
        averaged = [task for task in tasks if task.averaged]
        metric = " or ".join(sorted({task.metric for task in averaged}, reverse=True))
        yield Row(("average", metric, str(len(averaged)), ""), average)


def number(value: float) -> str:
    """A value, with the digits that a standard error of some thousands of documents leaves."""
    if abs(value) >= 1e6:
        return f"{value:.3e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.3f}"


def measured(measurement: Measurement | Difference) -> str:
    """A value with its standard error."""
    sign = "+" if isinstance(measurement, Difference) and measurement.value >= 0 else ""
    error = "" if measurement.stderr is None else f" ± {number(measurement.stderr)}"
    return f"{sign}{number(measurement.value)}{error}"


def errors(difference: Difference | None) -> str:
    """How many of its standard errors a difference is; empty if that is unknown, or the error is 0."""
    return f"{difference.value / difference.stderr:+.1f}" if difference is not None and difference.stderr else ""


def lines(all_rows: Sequence[Row], names: Sequence[str], against: str | None = None) -> Iterator[str]:
    """The table in lines of fixed width; with `against` a table for each model that is compared with that one.

    Args:
        all_rows: see `rows`; at least one.
        names: names of the models.
        against: name of the model that others are compared with.
    """
    short = {name: f"model {n}" if _is_long(name) else name for n, name in enumerate(names, 1)}
    compared = [name for name in names if name != against]
    if against is None or not compared:
        yield from _values(all_rows, names, short)
    for name in compared if against is not None else []:
        yield from ([""] if name != compared[0] else [])
        yield from _pair(all_rows, name, str(against), short)
    yield ""
    yield from (f"{short[name]}: {name}" for name in names if _is_long(name))
    yield "n: documents of a task, windows of a text, tasks of an average; ±: standard error"
    if against is not None and compared:
        yield f"difference: from {short[against]}, the same documents in pairs; errors: so many of its standard errors"


def _is_long(name: str) -> bool:
    return len(printable(name)) > LONGEST_NAME


def _values(all_rows: Sequence[Row], names: Sequence[str], short: dict[str, str]) -> Iterator[str]:
    yield _line(COLUMNS, [short[name] for name in names])
    for row in all_rows:
        yield _line(row.cells, [measured(row.results[name]) for name in names])


def _pair(all_rows: Sequence[Row], name: str, against: str, short: dict[str, str]) -> Iterator[str]:
    yield _line(COLUMNS, [short[against], short[name], "difference"], "errors")
    for row in all_rows:
        difference = row.results[name].difference
        cells = [measured(row.results[against]), measured(row.results[name])]
        yield _line(row.cells, [*cells, "" if difference is None else measured(difference)], errors(difference))


def _line(cells: Sequence[str], of_models: Sequence[str], last: str | None = None) -> str:
    parts = [f"{printable(cell):{layout}}" for cell, (_, layout) in zip(cells, _COLUMNS, strict=True)]
    parts += [f"{printable(cell):>{_MEASURED}}" for cell in of_models]
    parts += [] if last is None else [f"{last:>{_ERRORS}}"]
    return " ".join(parts).rstrip()
