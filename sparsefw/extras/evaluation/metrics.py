"""Metrics of models with standard errors, differences of models, and the table of an evaluation.

A metric is, to first order, a constant and a sum over documents, drawn independently of each other (the delta method).
Document i adds

    (x_i - mean) / n                        to a mean of x,
    (l_i - R w_i) / W                       to a ratio R = L / W, where L and W are the sums of l and w,
    f'(R) times that                        to a function f of such a ratio,

and the metric's variance is n / (n - 1) times the sum of the squares of these terms. Two models have answered the same
documents. So the terms of their difference are the differences of their terms, document by document.
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

# Papers on pruning average the first of these metrics that a task has.
MAIN = ("acc_norm", "acc")

# Results of `lm_eval.simple_evaluate`, with the names of the tasks' aggregations, see `harness.Tasks.results`.
Harness = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """The difference of a model from the model that it is compared with.

    Attributes:
        value: the model's value less the other model's.
        stderr: standard error of the difference, with the same documents in pairs; None: unknown.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Measurement:
    """A metric of a model.

    Attributes:
        value: the metric; NaN if the harness returns no number.
        stderr: its standard error; None: unknown.
        difference: the difference from the model that others are compared with; None for that model, without such a
            model, and for a metric whose standard error is unknown.
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
        filter: name of the harness's filter of answers; "none" without a filter.
        documents: number of documents.
        shots: number of examples before each question.
        version: version of the task; empty without a version.
        higher_is_better: whether a higher value is better; None: unknown.
        averaged: whether the average over tasks includes it.
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
        tokens: number of tokens that are predicted, in all windows.
        results: perplexity by model.
    """

    tokens: int
    results: dict[str, Measurement]


@dataclass(frozen=True)
class Evaluation:
    """The results of several models, the content of evaluation.json.

    Attributes:
        models: names of the models in the user's order; the model that others are compared with comes first.
        against: name of the model that others are compared with; None: models are not compared.
        tasks: metrics of tasks and of groups of tasks.
        texts: perplexity on texts.
    """

    models: list[str]
    against: str | None
    tasks: list[TaskRecord]
    texts: list[TextRecord]

    @property
    def average(self) -> dict[str, Measurement]:
        """By model, the mean over tasks of acc_norm, or of acc in tasks without it; empty for fewer than two tasks.

        Standard errors are those of independent tasks.
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
        """As JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


# The derivative of a metric by R, by the harness's name of its aggregation.
DERIVATIVES: dict[str, Callable[[float], float]] = {
    "mean": lambda ratio: 1.0,
    "perplexity": lambda ratio: -exp(-ratio),
    "weighted_perplexity": lambda ratio: -exp(-ratio),
    "bits_per_byte": lambda ratio: -1 / math.log(2),
}


@np.errstate(invalid="ignore", over="ignore")
def terms_of(aggregation: str, values: Sequence[Any]) -> np.ndarray:
    """The term that each document adds to a metric, float64 (documents,).

    Args:
        aggregation: one of DERIVATIVES.
        values: for each document x, or the pair of l and w: w is a number of tokens, words or bytes.
    """
    numbers = np.array(values, dtype=np.float64)
    sums, weights = numbers.T if numbers.ndim == 2 else (numbers, np.ones(len(numbers)))
    ratio = float(sums.sum() / weights.sum())
    return DERIVATIVES[aggregation](ratio) * (sums - ratio * weights) / weights.sum()


def standard_error(terms: np.ndarray | None) -> float | None:
    """The standard error of a metric; None for a single document, and for terms that are infinite or unknown."""
    if terms is None or len(terms) < 2 or not np.isfinite(terms).all():
        return None
    return math.sqrt(len(terms) / (len(terms) - 1)) * float(np.linalg.norm(terms))


def _mean_of(measured: Sequence[Measurement | Difference]) -> tuple[float, float | None]:
    """The mean of independent values, and the standard error of the mean."""
    stderrs = [one.stderr for one in measured if one.stderr is not None]
    stderr = math.hypot(*stderrs) / len(stderrs) if len(stderrs) == len(measured) else None
    return sum(one.value for one in measured) / len(measured), stderr


@np.errstate(invalid="ignore")
def _compared(found: Mapping[str, tuple[float, np.ndarray | None]], against: str | None) -> dict[str, Measurement]:
    """A metric by model, from its value and its terms by model; terms may be unknown."""
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
    """Perplexity on a text.

    Args:
        windows: the windows.
        losses: by model, for each window the mean negative log-likelihood of its predicted tokens.
        against: name of the model that others are compared with.
    """
    found = {
        name: (exp(sum(of_model) / windows.n), terms_of("perplexity", [-loss for loss in of_model]))
        for name, of_model in losses.items()
    }
    tokens = windows.n * (windows.seqlen - 1)
    return TextRecord(windows.source, windows.hash, windows.n, windows.seqlen, tokens, _compared(found, against))


def task_records(found: Mapping[str, Harness], against: str | None) -> list[TaskRecord]:
    """All metrics of all tasks and groups.

    Args:
        found: by model, the results of `harness.Tasks`; all of the same tasks.
        against: name of the model that others are compared with.
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
    """A metric of a task, by the harness's key "metric,filter"."""
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
    """Numbers of the records that the average includes.

    A group with an accuracy of its own counts as one task, and the tasks in it do not count.
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


# Columns of the table, and the side that their entries are aligned to.
COLUMNS = dict(task="<", metric="<", n=">", shots=">", value=">", difference=">") | {"z-score": ">", "model": "<"}


def lines(evaluation: Evaluation) -> Iterator[str]:
    """The lines of the table: all texts, all metrics of tasks, and the average over tasks."""
    rows = list[list[str]]()
    for text in evaluation.texts:
        rows += _rows([text.source, "perplexity", text.windows, 0], text.results)
    for task in evaluation.tasks:
        metric = task.metric if task.filter == "none" else f"{task.metric} ({task.filter})"
        rows += _rows([task.task, metric, task.documents, task.shots], task.results)
    averaged = [task for task in evaluation.tasks if task.averaged]
    rows += _rows(["average", "acc_norm or acc", len(averaged), 0], evaluation.average)
    # A column without an entry is left out.
    columns = [column for column in zip(COLUMNS, *rows, strict=True) if any(column[1:])]
    forms = [f"{COLUMNS[column[0]]}{max(map(len, column))}" for column in columns]
    for row in zip(*columns, strict=True):
        yield "  ".join(f"{cell:{form}}" for cell, form in zip(row, forms, strict=True)).rstrip()
    yield ""
    yield "n: documents of a task, windows of a text, tasks of the average; ±: standard error"
    if evaluation.against is not None:
        yield (
            f"difference: from {printable(evaluation.against)}, the same documents in pairs; z-score: difference / "
            "its standard error"
        )
    for text in evaluation.texts:
        yield f"perplexity: {amount(text.source, text.windows, text.seqlen)} of {printable(text.source)}"


def _rows(cells: list[object], results: Mapping[str, Measurement]) -> list[list[str]]:
    """The rows of a metric, one for each model. Zeros are left out, and only the first row has `cells`."""
    rows, shared = [], [printable(str(cell or "")) for cell in cells]
    for name, measured in results.items():
        difference = measured.difference
        z = f"{difference.value / difference.stderr:+.1f}" if difference and difference.stderr else ""
        rows.append([*shared, _number(measured), _number(difference) if difference else "", z, printable(name)])
        shared = [""] * len(cells)
    return rows


def _number(measured: Measurement | Difference) -> str:
    """A value with its standard error."""
    sign = "+" if isinstance(measured, Difference) and measured.value >= 0 else ""
    error = "" if measured.stderr is None else f" ± {_digits(measured.stderr)}"
    return f"{sign}{_digits(measured.value)}{error}"


def _digits(value: float) -> str:
    """A value, with the digits that are certain for some thousands of documents."""
    if abs(value) >= 1e6:
        return f"{value:.3e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.3f}"
