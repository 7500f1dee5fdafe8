"""Compute metrics with standard errors, differences between models, and the table of an evaluation.

To first order, a metric is a constant plus a sum over documents, which are drawn independently (the delta method).
Document i adds

    (x_i - mean) / n                        to a mean of x,
    (l_i - R w_i) / W                       to a ratio R = L / W, where L and W are the sums of l and w,
    f'(R) (l_i - R w_i) / W                 to a function f of such a ratio,

and the metric's variance is n / (n - 1) times the sum of the squares of these terms. Two models answer the same
documents. So a document's term in the difference of the models is the difference of its terms in both models.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from sparsefw.data.windows import Windows
from sparsefw.errors import printable
from sparsefw.model.head import exp
from sparsefw.report.content import TextWindows, amount

# The average over tasks takes the first of these metrics that a task has, as usual in papers on pruning.
MAIN = ("acc_norm", "acc")

# Results of `lm_eval.simple_evaluate`, with the added entry "aggregations", see `harness.Tasks.results`.
Harness = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """The difference between a model's metric and the reference model's.

    Attributes:
        value: the model's metric minus the reference model's.
        stderr: standard error of the difference, paired by document; None: unknown.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Measurement:
    """A metric of a model.

    Attributes:
        value: the metric; NaN if the harness returns no number.
        stderr: standard error of the metric; None: unknown.
        difference: the difference from the reference model. None for the reference model, without a reference model,
            and if the terms of the metric are unknown.
    """

    value: float
    stderr: float | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class TaskRecord:
    """A metric of a task, or of a group of tasks.

    Attributes:
        task: name of the task or group.
        metric: name of the metric.
        filter: name of the harness's filter of answers; "none": answers are not filtered.
        documents: number of documents.
        shots: number of examples before each question.
        version: version of the task; empty without a version.
        higher_is_better: whether a higher value is better; None: unknown.
        averaged: whether the average over tasks includes this metric.
        results: the metric by model.
    """

    task: str
    metric: str
    filter: str
    documents: int
    shots: int
    version: str
    higher_is_better: bool | None
    averaged: bool
    results: dict[str, Measurement]


@dataclass(frozen=True)
class TextRecord(TextWindows):
    """Perplexity on a text.

    Attributes:
        tokens: number of predicted tokens in all windows.
        results: perplexity by model.
    """

    tokens: int
    results: dict[str, Measurement]


@dataclass(frozen=True)
class Evaluation:
    """The results of several models, the content of evaluation.json.

    Attributes:
        models: names of the models, the reference model first, then in the user's order.
        against: name of the reference model, with which all others are compared; None: models are not compared.
        tasks: metrics of tasks and of groups of tasks.
        texts: perplexity on texts.
    """

    models: list[str]
    against: str | None
    tasks: list[TaskRecord]
    texts: list[TextRecord]

    @property
    def average(self) -> dict[str, Measurement]:
        """By model, the mean over tasks of acc_norm, or acc if a task has no acc_norm; empty for fewer than two tasks.

        The standard errors assume independent tasks.
        """
        averaged = [task.results for task in self.tasks if task.averaged]
        average = {}
        for name in self.models if len(averaged) > 1 else []:
            measured = [results[name] for results in averaged]
            differences = [one.difference for one in measured if one.difference is not None]
            difference = Difference(*_mean_of(differences)) if len(differences) == len(measured) else None
            average[name] = Measurement(*_mean_of(measured), difference)
        return average

    def to_json(self) -> str:
        """Return the content of evaluation.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


# The derivative f'(R) of a metric with respect to R. The key is the harness's name of the aggregation.
DERIVATIVES: dict[str, Callable[[float], float]] = {
    "mean": lambda ratio: 1.0,
    "perplexity": lambda ratio: -exp(-ratio),
    "weighted_perplexity": lambda ratio: -exp(-ratio),
    "bits_per_byte": lambda ratio: -1 / math.log(2),
}


@np.errstate(invalid="ignore", over="ignore")
def terms_of(aggregation: str, values: Sequence[Any]) -> np.ndarray:
    """Compute the term that each document adds to a metric, float64 (documents,).

    Args:
        aggregation: one of DERIVATIVES.
        values: for each document the value x, or the pair (l, w) of a ratio. l is a log-likelihood, and w a number of
            tokens, words or bytes.
    """
    numbers = np.array(values, dtype=np.float64)
    sums, weights = numbers.T if numbers.ndim == 2 else (numbers, np.ones(len(numbers)))
    ratio = float(sums.sum() / weights.sum())
    return DERIVATIVES[aggregation](ratio) * (sums - ratio * weights) / weights.sum()


def standard_error(terms: np.ndarray | None) -> float | None:
    """Compute a metric's standard error; None for a single document, and if terms are infinite or unknown."""
    if terms is None or len(terms) < 2 or not np.isfinite(terms).all():
        return None
    return math.sqrt(len(terms) / (len(terms) - 1)) * float(np.linalg.norm(terms))


def _mean_of(measured: Sequence[Measurement | Difference]) -> tuple[float, float | None]:
    """Compute the mean of independent values, and the standard error of the mean."""
    stderrs = [one.stderr for one in measured if one.stderr is not None]
    stderr = math.hypot(*stderrs) / len(stderrs) if len(stderrs) == len(measured) else None
    return sum(one.value for one in measured) / len(measured), stderr


@np.errstate(invalid="ignore")
def _compared(found: Mapping[str, tuple[float, np.ndarray | None]], against: str | None) -> dict[str, Measurement]:
    """Make the measurements of a metric by model. `found` has by model the value and the terms; None: terms unknown."""
    results = {}
    for name, (value, terms) in found.items():
        difference = None
        if against is not None and name != against:
            other, other_terms = found[against]
            if terms is not None and other_terms is not None and len(terms) == len(other_terms):
                difference = Difference(value - other, standard_error(terms - other_terms))
        results[name] = Measurement(value, standard_error(terms), difference)
    return results


def text_record(windows: Windows, losses: Mapping[str, Sequence[float]], against: str | None) -> TextRecord:
    """Compute the perplexities on a text.

    Args:
        windows: the windows of the text.
        losses: by model, for each window the mean negative log-likelihood of the predicted tokens.
        against: name of the reference model; None: models are not compared.
    """
    found = {
        name: (exp(sum(of_model) / windows.n), terms_of("perplexity", [-loss for loss in of_model]))
        for name, of_model in losses.items()
    }
    tokens = windows.n * (windows.seqlen - 1)
    return TextRecord(windows.source, windows.hash, windows.n, windows.seqlen, tokens, _compared(found, against))


def task_records(found: Mapping[str, Harness], against: str | None) -> list[TaskRecord]:
    """Make the records of all metrics of all tasks and groups.

    Args:
        found: by model, the results of `harness.Tasks`. All models have the same tasks.
        against: name of the reference model; None: models are not compared.
    """
    first = next(iter(found.values()))
    records = [
        _record(found, task, key, against)
        for task, metrics in first["results"].items()
        for key in metrics
        if "," in key and not key.partition(",")[0].endswith("_stderr")
    ]
    averaged = _averaged(records, first.get("group_subtasks", {}))
    return [replace(record, averaged=n in averaged) for n, record in enumerate(records)]


def _record(found: Mapping[str, Harness], task: str, key: str, against: str | None) -> TaskRecord:
    """Make the record of a task's metric. `key` is the harness's key, "metric,filter"."""
    metric, _, filter_name = key.partition(",")
    first = next(iter(found.values()))
    aggregation = first["aggregations"].get(task, {}).get(metric)
    measured: dict[str, tuple[float, np.ndarray | None]] = {}
    for name, harness in found.items():
        value = harness["results"][task].get(key)
        samples = sorted(harness["samples"].get(task, []), key=lambda sample: sample["doc_id"])
        documents = [x[metric] for x in samples if x["filter"] == filter_name and metric in x]
        terms = terms_of(aggregation, documents) if documents and aggregation else None
        measured[name] = float(value) if isinstance(value, Real) else math.nan, terms
    version = first["versions"].get(task)
    better = first["higher_is_better"].get(task, {}).get(metric)
    return TaskRecord(
        task=task,
        metric=metric,
        filter=filter_name,
        documents=len(documents) or int(first["results"][task].get("sample_len", 0)),
        shots=int(first["n-shot"].get(task) or 0),
        version="" if version in (None, "N/A") else str(version),
        higher_is_better=None if better is None else bool(better),
        averaged=False,
        results=_compared(measured, against),
    )


def _averaged(records: Sequence[TaskRecord], children: Mapping[str, Sequence[str]]) -> set[int]:
    """Choose the records that the average includes, by number.

    A group that has an accuracy itself counts as one task, and the tasks in the group do not count.
    """
    main: dict[str, int] = {}
    for metric in MAIN:
        for n, record in enumerate(records):
            if record.metric == metric:
                main.setdefault(record.task, n)
    inside = {name for group in main for name in children.get(group, [])}
    while more := {name for group in inside for name in children.get(group, [])} - inside:
        inside |= more
    return {n for task, n in main.items() if task not in inside}


# Columns of the table, with their alignment.
COLUMNS = {
    "task": "<",
    "metric": "<",
    "n": ">",
    "shots": ">",
    "value": ">",
    "difference": ">",
    "z-score": ">",
    "model": "<",
}


def lines(evaluation: Evaluation) -> Iterator[str]:
    """Yield the table in lines: all texts, all metrics of tasks, and the average over tasks."""
    rows = list[list[str]]()
    for text in evaluation.texts:
        rows += _rows([text.source, "perplexity", text.windows, 0], text.results)
    for task in evaluation.tasks:
        metric = task.metric if task.filter == "none" else f"{task.metric} ({task.filter})"
        rows += _rows([task.task, metric, task.documents, task.shots], task.results)
    averaged = [task for task in evaluation.tasks if task.averaged]
    rows += _rows(["average", "acc_norm or acc", len(averaged), 0], evaluation.average)
    # Leave out columns without entries.
    columns = [column for column in zip(COLUMNS, *rows, strict=True) if any(column[1:])]
    forms = [f"{COLUMNS[column[0]]}{max(map(len, column))}" for column in columns]
    for row in zip(*columns, strict=True):
        yield "  ".join(f"{cell:{form}}" for cell, form in zip(row, forms, strict=True)).rstrip()
    yield ""
    yield "n: documents of a task, windows of a text, tasks of the average; ±: standard error"
    if evaluation.against is not None:
        yield (
            f"difference: from {printable(evaluation.against)}, paired by document; z-score: difference / "
            "its standard error"
        )
    for text in evaluation.texts:
        yield f"perplexity: {amount(text.source, text.windows, text.seqlen)} of {printable(text.source)}"


def _rows(cells: list[object], results: Mapping[str, Measurement]) -> list[list[str]]:
    """Make the rows of a metric, one for each model. Only the first row has `cells`, where 0 is left blank."""
    rows, shared = [], [printable(str(cell or "")) for cell in cells]
    for name, measured in results.items():
        difference = measured.difference
        z = f"{difference.value / difference.stderr:+.1f}" if difference and difference.stderr else ""
        rows.append([*shared, _number(measured), _number(difference) if difference else "", z, printable(name)])
        shared = [""] * len(cells)
    return rows


def _number(measured: Measurement | Difference) -> str:
    """Write a value with its standard error."""
    sign = "+" if isinstance(measured, Difference) and measured.value >= 0 else ""
    error = "" if measured.stderr is None else f" ± {_digits(measured.stderr)}"
    return f"{sign}{_digits(measured.value)}{error}"


def _digits(value: float) -> str:
    """Write a value with as many digits as some thousands of documents make certain."""
    if abs(value) >= 1e6:
        return f"{value:.3e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.3f}"
