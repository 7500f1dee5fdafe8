"""What was measured of models on tasks and texts, as reports hold it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
class TextRecord:
    """Perplexity on a text.

    Attributes:
        source: the text, as the user has named it.
        hash: SHA-256 of the tokens, in hex.
        windows: number of windows.
        seqlen: tokens in a window.
        tokens: number of tokens that are predicted, in all windows.
        results: perplexity by model.
    """

    source: str
    hash: str
    windows: int
    seqlen: int
    tokens: int
    results: dict[str, Measurement]


def average_of(tasks: Sequence[TaskRecord]) -> dict[str, Measurement]:
    """The mean over tasks of the metrics that count, all tasks alike; empty for fewer than two.

    Its standard errors take tasks as independent.
    """
    averaged = [task.results for task in tasks if task.averaged]
    if len(averaged) < 2:
        return {}
    return {name: _mean([results[name] for results in averaged]) for name in averaged[0]}


def _mean(measured: Sequence[Measurement]) -> Measurement:
    n = len(measured)
    value, weights = sum(one.value for one in measured) / n, [1 / n] * n
    stderr = weighted_stderr([one.stderr for one in measured], weights)
    return Measurement(value, stderr, weighted_difference(measured, weights))


def weighted_stderr(stderrs: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Standard error of a weighted sum of independent numbers; None if one of theirs is unknown."""
    known = [stderr for stderr in stderrs if stderr is not None]
    if len(known) < len(stderrs):
        return None
    return math.hypot(*(weight * stderr for weight, stderr in zip(weights, known, strict=True)))


def weighted_difference(measured: Sequence[Measurement], weights: Sequence[float]) -> Difference | None:
    """The difference of weighted sums of independent metrics; None if one of them has none."""
    differences = [one.difference for one in measured if one.difference is not None]
    if len(differences) < len(measured):
        return None
    value = sum(weight * difference.value for weight, difference in zip(weights, differences, strict=True))
    return Difference(value, weighted_stderr([difference.stderr for difference in differences], weights))
