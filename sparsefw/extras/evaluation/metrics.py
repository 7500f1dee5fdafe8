"""What was measured of models: metrics with standard errors, and differences of models.

A metric is, to first order, a constant and a sum over documents, drawn independently of each other (the delta method).
Document i adds

    (x_i - mean) / n                        to a mean of x,
    (l_i - R w_i) / W                       to a ratio R = L / W, where L and W are the sums of l and w,
    f'(R) times that                        to a function f of such a ratio,

and the metric's variance is n / (n - 1) times the sum of their squares. Two models have answered the same documents. So
their difference has the differences of these terms, document by document.
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

# Papers on pruning average the first of these that a task has.
MAIN = ("acc_norm", "acc")

# `lm_eval.simple_evaluate` returns these.
Harness = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """The difference of a model from the one that it is compared with.

    Attributes:
        value: the model's value less the other's.
        stderr: standard error of the difference, the same documents compared in pairs; None: unknown.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Measurement:
    """A metric of a model.

    Attributes:
        value: the metric; NaN where the harness gives no number.
        stderr: its standard error; None: unknown.
        difference: its difference from the model that it is compared with; None for that model, without one, and for a
            metric that is no sum over documents, of which the standard error cannot be told.
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
        filter: name of the filter that answers went through; "none" without one.
        documents: number of documents.
        shots: number of examples before each question.
        version: version of the task; empty without one.
        higher_is_better: whether more of it is better; None: unknown.
        averaged: whether the average over tasks counts it.
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
        models: names of the models, in the order in which the user gave them; first the one that others are compared
            with.
        against: name of the model that others are compared with; None: none.
        tasks: metrics of tasks and of groups of tasks.
        texts: perplexity on texts.
    """

    models: list[str]
    against: str | None
    tasks: list[TaskRecord]
    texts: list[TextRecord]

    @property
    def average(self) -> dict[str, Measurement]:
        """By model, the mean over tasks of acc_norm where a task has it, else of acc; empty for fewer than two tasks.

        Its standard errors take tasks as independent.
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


@dataclass(frozen=True)
class Estimate:
    """A metric.

    Attributes:
        value: the metric.
        terms: what each document adds to the metric, to first order, float64 (documents,).
    """

    value: float
    terms: np.ndarray

    @property
    def stderr(self) -> float | None:
        """Its standard error; None for a single document, and if some term is infinite."""
        n = len(self.terms)
        if n < 2 or not np.isfinite(self.terms).all():
            return None
        return math.sqrt(n / (n - 1)) * float(np.linalg.norm(self.terms))

    def minus(self, other: "Estimate") -> Difference:
        """The difference from another model's metric of the same documents."""
        with np.errstate(invalid="ignore"):
            return Difference(self.value - other.value, Estimate(0.0, self.terms - other.terms).stderr)


def _perplexity(ratio: float) -> tuple[float, float]:
    return exp(-ratio), -exp(-ratio)


# A metric is a function of a ratio R = L / W. It stands here with its derivative, and with whether the documents have a
# W of their own: a number of tokens, words or bytes.
FORMULAS: dict[str, tuple[Callable[[float], tuple[float, float]], bool]] = {
    "mean": (lambda ratio: (ratio, 1.0), False),
    "perplexity": (_perplexity, False),
    "weighted_perplexity": (_perplexity, True),
    "bits_per_byte": (lambda ratio: (-ratio / math.log(2), -1 / math.log(2)), True),
}


def estimate(formula: str, values: Sequence[Any]) -> Estimate | None:
    """A metric of the documents' values; None if they are not what the formula takes.

    Args:
        formula: one of FORMULAS.
        values: for each document a number, or a pair of numbers.
    """
    function, weighted = FORMULAS[formula]
    pairs = values if weighted else [(value, 1) for value in values]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        return None
    if not all(isinstance(number, Real | np.bool_) for pair in pairs for number in pair):
        return None
    sums, weights = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    total = float(weights.sum())
    if not total > 0:
        return None
    ratio = float(sums.sum()) / total
    value, derivative = function(ratio)
    with np.errstate(invalid="ignore", over="ignore"):
        return Estimate(value, derivative * ((sums - ratio * weights) / total))


def estimate_of(value: float, values: Sequence[Any]) -> Estimate | None:
    """The estimate behind a metric of the harness; None if no formula gives the metric from the documents' values."""
    found = (estimate(formula, values) for formula in FORMULAS)
    return next((x for x in found if x and math.isclose(x.value, value, rel_tol=1e-9, abs_tol=1e-12)), None)


def _mean_of(measured: Sequence[Measurement | Difference]) -> tuple[float, float | None]:
    """The mean of independent values, and its standard error."""
    stderrs = [one.stderr for one in measured if one.stderr is not None]
    stderr = math.hypot(*stderrs) / len(stderrs) if len(stderrs) == len(measured) else None
    return sum(one.value for one in measured) / len(measured), stderr


def _compared(
    values: Mapping[str, float], estimates: Mapping[str, Estimate | None], against: str | None
) -> dict[str, Measurement]:
    """A metric by model."""
    results = {}
    for name, value in values.items():
        mine, other = estimates[name], None if against in (None, name) else estimates[str(against)]
        difference = mine.minus(other) if mine and other and len(mine.terms) == len(other.terms) else None
        results[name] = Measurement(value, mine.stderr if mine else None, difference)
    return results


def text_record(windows: Windows, likelihoods: Mapping[str, Sequence[float]], against: str | None) -> TextRecord:
    """Perplexity on a text.

    Args:
        windows: the windows.
        likelihoods: by model, for each window the log-likelihood of all its tokens but the first.
        against: name of the model that others are compared with.
    """
    predicted = windows.seqlen - 1
    estimates = {
        name: estimate("weighted_perplexity", [(x, predicted) for x in of]) for name, of in likelihoods.items()
    }
    values = {name: found.value for name, found in estimates.items() if found is not None}
    results = _compared(values, estimates, against)
    return TextRecord(windows.source, windows.hash, windows.n, windows.seqlen, windows.n * predicted, results)


def task_records(found: Mapping[str, Harness], against: str | None) -> list[TaskRecord]:
    """All metrics of all tasks and groups.

    Args:
        found: by model, what the harness has returned, with samples; all of the same tasks.
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
    values: dict[str, float] = {}
    estimates: dict[str, Estimate | None] = {}
    for name, harness in found.items():
        value = harness["results"][task].get(key)
        values[name] = float(value) if isinstance(value, Real) else math.nan
        samples = sorted(harness.get("samples", {}).get(task, []), key=lambda sample: sample["doc_id"])
        documents = [x[metric] for x in samples if x["filter"] == filter_name and metric in x]
        estimates[name] = estimate_of(values[name], documents)
    version = harness.get("versions", {}).get(task)
    better = harness.get("higher_is_better", {}).get(task, {}).get(metric)
    return TaskRecord(
        task=task,
        metric=metric,
        filter=filter_name,
        documents=len(documents) or int(harness["results"][task].get("sample_len", 0)),
        shots=int(harness.get("n-shot", {}).get(task) or 0),
        version="" if version in (None, "N/A") else str(version),
        higher_is_better=None if better is None else bool(better),
        averaged=False,
        results=_compared(values, estimates, against),
    )


def _averaged(records: Sequence[TaskRecord], children: Mapping[str, Sequence[str]]) -> set[int]:
    """Numbers of the records that the average counts.

    A group with an accuracy of its own counts as one task, and the tasks in it do not.
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


# Columns of the table of an evaluation, and their sides.
COLUMNS = dict(task="<", metric="<", n=">", shots=">", value=">", difference=">") | {"z-score": ">", "model": "<"}


def lines(evaluation: Evaluation) -> Iterator[str]:
    """The table of an evaluation: all texts, all metrics of tasks, and the average over tasks."""
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
    """The rows of a metric, one for each model; zeros are left out, and what all models share stands in the first."""
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
    """A value, with the digits that a standard error of some thousands of documents leaves."""
    if abs(value) >= 1e6:
        return f"{value:.3e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.3f}"
