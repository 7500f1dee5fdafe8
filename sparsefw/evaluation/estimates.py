"""Metrics as functions of documents, with the standard errors that follow.

A metric is, to first order, a constant and a sum over documents, drawn independently of each other (the delta method).
Document i adds

    (x_i - mean) / n                        to a mean of x,
    (l_i - R w_i) / W                       to a ratio R = L / W, where L and W are the sums of l and w,
    f'(R) times that                        to a function f of such a ratio,

and the metric's variance is n / (n - 1) times the sum of their squares. Two models have answered the same documents. So
their difference has the differences of these terms, document by document.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from sparsefw.model.head import exp
from sparsefw.report.tasks import Difference


def same(one: float, other: float) -> bool:
    """Whether two numbers are the same but for the order of a sum."""
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


@dataclass(frozen=True)
class Estimate:
    """A metric.

    Attributes:
        value: the metric.
        documents: the documents, in ascending order.
        terms: what each document adds to the metric, to first order, float64 (documents,).
    """

    value: float
    documents: list[int]
    terms: np.ndarray

    @property
    def stderr(self) -> float | None:
        """Its standard error; None for a single document, and if some term is infinite."""
        return _stderr(self.terms)


def _stderr(terms: np.ndarray) -> float | None:
    n = len(terms)
    # A perplexity that is infinite has none either.
    return math.sqrt(n / (n - 1)) * float(np.linalg.norm(terms)) if n > 1 and np.isfinite(terms).all() else None


def difference(estimate: Estimate | None, other: Estimate | None) -> Difference | None:
    """The difference of a model's metric from another's; None if they are not of the same documents."""
    if estimate is None or other is None or estimate.documents != other.documents:
        return None
    with np.errstate(invalid="ignore"):
        return Difference(estimate.value - other.value, _stderr(estimate.terms - other.terms))


def mean(values: Mapping[int, Any]) -> Estimate | None:
    """The mean of a number for each document."""
    documents, x = _numbers(values)
    with np.errstate(invalid="ignore"):
        return None if x is None else Estimate(float(x.mean()), documents, (x - x.mean()) / len(x))


def perplexity(values: Mapping[int, Any]) -> Estimate | None:
    """exp of minus the mean of a log-likelihood for each document."""
    return _function(mean(values), lambda r: exp(-r), lambda r: -exp(-r))


def weighted_perplexity(values: Mapping[int, Any]) -> Estimate | None:
    """exp(-L / W), for a log-likelihood and a number of tokens, words or bytes of each document."""
    return _function(_ratio(values), lambda r: exp(-r), lambda r: -exp(-r))


def bits_per_byte(values: Mapping[int, Any]) -> Estimate | None:
    """-L / (W log 2), for a log-likelihood and a number of bytes of each document."""
    return _function(_ratio(values), lambda r: -r / math.log(2), lambda r: -1 / math.log(2))


# The harness's names of aggregations that are such functions.
FORMULAS = {
    "mean": mean,
    "perplexity": perplexity,
    "weighted_perplexity": weighted_perplexity,
    "bits_per_byte": bits_per_byte,
}


def estimate_of(value: float, values: Mapping[int, Any], aggregation: str | None = None) -> Estimate | None:
    """The estimate behind a metric of the harness; None if no formula gives the metric from the documents' values.

    Args:
        value: the metric.
        values: what the harness aggregates, by document.
        aggregation: name of the aggregation, if the task names one.
    """
    names = FORMULAS if aggregation is None else FORMULAS.keys() & {aggregation}
    for name in names:
        found = FORMULAS[name](values) if values else None
        if found is not None and same(found.value, value):
            return found
    return None


def _ratio(values: Mapping[int, Any]) -> Estimate | None:
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in values.values()):
        return None
    documents, sums = _numbers({document: pair[0] for document, pair in values.items()})
    _, weights = _numbers({document: pair[1] for document, pair in values.items()})
    total = 0.0 if weights is None else float(weights.sum())
    if sums is None or weights is None or not total > 0:
        return None
    ratio = float(sums.sum()) / total
    with np.errstate(invalid="ignore"):
        return Estimate(ratio, documents, (sums - ratio * weights) / total)


def _function(
    estimate: Estimate | None, function: Callable[[float], float], derivative: Callable[[float], float]
) -> Estimate | None:
    """A function of an estimate."""
    if estimate is None:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        terms = derivative(estimate.value) * estimate.terms
    return Estimate(function(estimate.value), estimate.documents, terms)


def _numbers(values: Mapping[int, Any]) -> tuple[list[int], np.ndarray | None]:
    """Documents in ascending order with their numbers; None if one of them is none."""
    documents = sorted(values)
    numbers = [values[document] for document in documents]
    if not all(isinstance(number, Real | np.bool_) for number in numbers):
        return documents, None
    return documents, np.array(numbers, dtype=np.float64)
