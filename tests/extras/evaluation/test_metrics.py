"""Standard errors of metrics and differences, against formulas and a bootstrap; records of the harness's results."""

import math
import statistics

import numpy as np
import pytest
import torch

from sparsefw.data.windows import windows_of
from sparsefw.extras.evaluation.metrics import (
    Difference,
    Evaluation,
    Measurement,
    standard_error,
    task_records,
    terms_of,
)

DRAWS = 4000
WINDOWS = windows_of(torch.zeros(4, 8, dtype=torch.int64), "a \x1b text")


# By aggregation: the metric of many samples (draws, documents) or (draws, documents, 2) at once.
METRICS = {
    "mean": lambda x: x.mean(1),
    "perplexity": lambda x: np.exp(-x.mean(1)),
    "weighted_perplexity": lambda x: np.exp(-x[..., 0].sum(1) / x[..., 1].sum(1)),
    "bits_per_byte": lambda x: -x[..., 0].sum(1) / x[..., 1].sum(1) / math.log(2),
}


@pytest.mark.parametrize("name", METRICS)
def test_against_a_bootstrap(name):
    """Two models whose log-likelihoods go together, on documents whose numbers of tokens differ much."""
    rng, n = np.random.default_rng(0), 300
    tokens, hard = rng.integers(5, 200, n), rng.normal(3, 0.5, n)
    models = [-tokens * (factor * hard + rng.normal(0, noise, n)) for factor, noise in ((1, 0.1), (1.2, 0.2))]
    weighted = name not in ("mean", "perplexity")
    dense, pruned = (np.stack([x, tokens], 1) if weighted else x / tokens for x in models)
    # Documents are drawn again.
    rows = np.random.default_rng(1).integers(0, n, (DRAWS, n))
    drawn = METRICS[name](dense[rows]), METRICS[name](pruned[rows])
    terms = terms_of(name, dense.tolist()), terms_of(name, pruned.tolist())
    assert standard_error(terms[0]) == pytest.approx(drawn[0].std(ddof=1), rel=0.06)
    of_difference = standard_error(terms[1] - terms[0])
    assert of_difference == pytest.approx((drawn[1] - drawn[0]).std(ddof=1), rel=0.06)
    # Not taking documents in pairs would give a number far from it.
    assert not 0.8 < math.hypot(*map(standard_error, terms)) / of_difference < 1.25


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "values"), [
    ("weighted_perplexity", [(-math.inf, 3), (-2.0, 3)]),
    # Finite, and yet beyond what a number holds.
    ("perplexity", [-1e4, -1.1e4]),
    ("mean", [1]),
])  # fmt: skip
def test_where_there_is_no_standard_error(name, values):
    assert standard_error(terms_of(name, values)) is None


# Accuracies of documents by task, of two models. The group "mmlu" has the group "inner", and this has "law" and "art".
RIGHT = {"boolq": {"acc": [1, 0, 1, 1]}, "arc": {"acc": [1, 0, 0], "acc_norm": [1, 1, 0]}, "law": {"acc": [0, 1]}}
WRONG = {"boolq": {"acc": [0, 0, 1, 0]}, "arc": {"acc": [1, 0, 0], "acc_norm": [0, 1, 0]}, "law": {"acc": [0, 0]}}


def harness_of(values: dict) -> dict:
    """What the harness returns for tasks and groups."""
    results = {task: {f"{metric},none": statistics.fmean(x) for metric, x in of.items()} for task, of in values.items()}
    results["boolq"] |= {"alias": "boolq", "acc_stderr,none": "N/A"}
    results |= {group: {"acc,none": 0.5, "sample_len": 120} for group in ("mmlu", "inner")}
    # The harness gives documents in any order.
    samples = {
        task: [{"doc_id": n, "filter": "none"} | {m: x[n] for m, x in of.items()} for n in range(len(of["acc"]))][::-1]
        for task, of in values.items()
    }
    told = {"versions": {"boolq": 1.0}, "n-shot": {"boolq": 5}, "higher_is_better": {"boolq": {"acc": True}}}
    told["aggregations"] = {task: dict.fromkeys(of, "mean") for task, of in values.items()}
    told["group_subtasks"] = {"mmlu": ["inner"], "inner": ["law"]}
    return {"results": results, "samples": samples} | told


RECORDS = task_records({"dense": harness_of(RIGHT), "pruned": harness_of(WRONG)}, "dense")


def test_records():
    by_name = {(record.task, record.metric): record for record in RECORDS}
    assert len(by_name) == 6
    record = by_name["boolq", "acc"]
    assert (record.documents, record.shots, record.version, record.higher_is_better) == (4, 5, "1.0", True)
    assert record.results["dense"] == Measurement(0.75, pytest.approx(0.25))
    # The differences of the documents are -1, 0, 0, -1.
    difference = Difference(-0.5, pytest.approx(statistics.stdev([-1, 0, 0, -1]) / 2))
    assert record.results["pruned"] == Measurement(0.25, pytest.approx(0.25), difference)
    # A group has a value alone.
    assert by_name["mmlu", "acc"].results["pruned"] == Measurement(0.5)
    assert by_name["mmlu", "acc"].documents == 120


def test_the_average():
    """Over tasks and groups, of acc_norm, or else acc: not of what is in a group."""
    counted = [record for record in RECORDS if record.averaged]
    assert [(x.task, x.metric) for x in counted] == [("boolq", "acc"), ("arc", "acc_norm"), ("mmlu", "acc")]
    average = Evaluation(["dense", "pruned"], "dense", counted, []).average["pruned"]
    # The standard error of a group is not known.
    assert average == Measurement(pytest.approx((0.25 + 1 / 3 + 0.5) / 3))
    average = Evaluation(["dense", "pruned"], "dense", counted[:2], []).average["pruned"]
    errors = [record.results["pruned"].difference.stderr for record in counted[:2]]
    assert average.difference.stderr == pytest.approx(math.hypot(*errors) / 2)
    assert Evaluation(["dense"], None, counted[:1], []).average == {}
