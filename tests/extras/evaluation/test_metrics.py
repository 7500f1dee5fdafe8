"""Standard errors of metrics and differences, against formulas and a bootstrap; records of the harness's results."""

import json
import math
import statistics

import numpy as np
import pytest
import torch

from sparsefw.data.windows import windows_of
from sparsefw.extras.evaluation import metrics
from sparsefw.extras.evaluation.metrics import Evaluation, estimate, estimate_of, task_records, text_record

DRAWS = 4000


def drawn(seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-likelihoods of two models, which go together, and numbers of tokens that differ much."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 200, n)
    hard = rng.normal(3, 0.5, n)
    dense = -tokens * (hard + rng.normal(0, 0.1, n))
    pruned = -tokens * (1.2 * hard + rng.normal(0, 0.2, n))
    return dense, pruned, tokens


def bootstrap(metric, *models) -> float:
    """Standard error of the difference of two models' metric, or of one metric, by drawing documents again."""
    n = len(models[0])
    rows = np.random.default_rng(1).integers(0, n, (DRAWS, n))
    values = [metric(values[rows]) for values in models]
    return float(np.std(values[0] - values[1] if len(values) == 2 else values[0], ddof=1))


# The metric of many samples (draws, documents) or (draws, documents, 2) at once.
METRICS = {
    "mean": lambda x: x.mean(1),
    "perplexity": lambda x: np.exp(-x.mean(1)),
    "weighted_perplexity": lambda x: np.exp(-x[..., 0].sum(1) / x[..., 1].sum(1)),
    "bits_per_byte": lambda x: -x[..., 0].sum(1) / x[..., 1].sum(1) / math.log(2),
}


@pytest.mark.parametrize("name", METRICS)
def test_against_a_bootstrap(name):
    dense, pruned, tokens = drawn(0)
    if name in ("mean", "perplexity"):
        models = [x / tokens for x in (dense, pruned)]
        values = [x.tolist() for x in models]
    else:
        models = [np.stack([x, tokens], 1) for x in (dense, pruned)]
        values = [[*map(tuple, x.tolist())] for x in models]
    one, other = (estimate(name, x) for x in values)
    for of_one, model, of_model in zip((one, other), models, values, strict=True):
        assert of_one.value == pytest.approx(METRICS[name](model[None])[0], rel=1e-12)
        assert of_one.stderr == pytest.approx(bootstrap(METRICS[name], model), rel=0.06)
        assert estimate_of(of_one.value, of_model).stderr == of_one.stderr
    found = other.minus(one)
    assert found.value == other.value - one.value
    assert found.stderr == pytest.approx(bootstrap(METRICS[name], models[1], models[0]), rel=0.06)
    # Not taking documents in pairs would give a number far from it.
    assert not 0.8 < math.hypot(one.stderr, other.stderr) / found.stderr < 1.25


@pytest.mark.parametrize("values", [
    [(1, 0), (1, 1), (0, 0)],  # f1: pairs of truth and answer
    [("a", "b"), ("c", "d")],  # bleu
    [(0, np.array([0.5, 0.5])), (1, np.array([0.1, 0.9]))],  # brier_score
    [0.5, 0.25, 0.125],  # the median is not the mean
    [{"f1": 1.0}, {"f1": 0.0}],
    [(-1.0, 0), (-2.0, 0)],
    [],
])  # fmt: skip
def test_other_metrics_have_no_estimate(values):
    assert estimate_of(0.25, values) is None


@pytest.mark.filterwarnings("error")
def test_where_there_is_no_standard_error():
    infinite = [-math.inf, -2.0, -3.0]
    for found in (estimate("perplexity", infinite), estimate("weighted_perplexity", [(x, 3) for x in infinite])):
        assert (found.value, found.stderr) == (math.inf, None)
        assert found.minus(found).stderr is None
    # Finite, and yet beyond what a number holds.
    assert estimate("perplexity", [-1e4, -1.1e4]).stderr is None
    # A single document.
    assert estimate("mean", [1]).minus(estimate("mean", [0])) == metrics.Difference(1.0, None)


def harness_of(seed: int, groups: dict | None = None) -> dict:
    """What the harness returns for some tasks and groups."""
    rng = np.random.default_rng(seed)
    values = {
        "boolq": {"acc": rng.integers(0, 2, 40).tolist()},
        "arc": {"acc": rng.integers(0, 2, 60).tolist(), "acc_norm": rng.integers(0, 2, 60).tolist()},
        "law": {"acc": rng.integers(0, 2, 30).tolist()},
        "art": {"acc": rng.integers(0, 2, 90).tolist()},
    }
    results = {
        task: {"alias": task, "sample_len": len(of["acc"])}
        | {f"{metric},none": statistics.fmean(x) for metric, x in of.items()}
        | {f"{metric}_stderr,none": "N/A" for metric in of}
        for task, of in values.items()
    }
    results |= {group: {"alias": group, "acc,none": 0.5, "sample_len": 120} for group in groups or {}}
    # The harness gives documents in any order.
    samples = {
        task: [
            {"doc_id": n, "filter": "none", **{metric: x[n] for metric, x in of.items()}}
            for n in rng.permutation(len(of["acc"])).tolist()
        ]
        for task, of in values.items()
    }
    told = {"versions": dict.fromkeys(values, 1.0), "n-shot": dict.fromkeys(values, 5), "group_subtasks": groups or {}}
    return {
        "results": results,
        "samples": samples,
        "higher_is_better": {"boolq": {"acc": True}},
        "values": values,
    } | told


@pytest.fixture
def found():
    groups = {"mmlu": ["inner"], "inner": ["law", "art"]}
    return {"dense": harness_of(0, groups), "pruned": harness_of(1, groups)}


def test_records(found):
    records = {(record.task, record.metric): record for record in task_records(found, "dense")}
    assert len(records) == 7
    for task, metric in (("boolq", "acc"), ("arc", "acc_norm")):
        dense, pruned = (of["values"][task][metric] for of in found.values())
        result, n = records[task, metric].results, len(dense)
        assert result["dense"].value == statistics.fmean(dense)
        assert result["dense"].stderr == pytest.approx(statistics.stdev(dense) / math.sqrt(n))
        assert result["dense"].difference is None
        differences = [y - x for x, y in zip(dense, pruned, strict=True)]
        expected = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
        difference = result["pruned"].difference
        assert (difference.value, difference.stderr) == pytest.approx(expected)
    record = records["boolq", "acc"]
    assert (record.documents, record.shots, record.version, record.higher_is_better) == (40, 5, "1.0", True)
    # A group has a value alone.
    assert records["mmlu", "acc"].results["pruned"] == metrics.Measurement(0.5)
    assert records["mmlu", "acc"].documents == 120


def test_the_average(found):
    """Over tasks and groups, of acc_norm, or else acc: not of what is in a group."""
    records = task_records(found, "dense")
    counted = {(record.task, record.metric): record for record in records if record.averaged}
    assert counted.keys() == {("boolq", "acc"), ("arc", "acc_norm"), ("mmlu", "acc")}
    average = Evaluation(["dense", "pruned"], "dense", records, []).average["pruned"]
    results = [record.results["pruned"] for record in counted.values()]
    assert average.value == pytest.approx(statistics.fmean(one.value for one in results))
    # That of a group is not known.
    assert (average.stderr, average.difference) == (None, None)
    without = [record for record in records if record.task in ("boolq", "arc")]
    average = Evaluation(["dense", "pruned"], "dense", without, []).average["pruned"]
    stderrs = [one.difference.stderr for one in results[:2]]
    assert average.difference.stderr == pytest.approx(math.hypot(*stderrs) / 2)
    assert Evaluation(["dense"], None, without[:1], []).average == {}


def test_the_table(found):
    windows = windows_of(torch.zeros(4, 8, dtype=torch.int64), "a \x1b text")
    text = text_record(windows, {"dense": [-7.0, -7.0, -14.0, -7.0], "pruned": [-14.0] * 4}, "dense")
    assert (text.windows, text.seqlen, text.tokens) == (4, 8, 28)
    assert text.results["pruned"].value == pytest.approx(math.exp(2))
    evaluation = Evaluation(["dense", "pruned"], "dense", task_records(found, "dense"), [text])
    lines = [" ".join(line.split()) for line in metrics.lines(evaluation)]
    assert lines[0] == "task metric n shots value difference z-score model"
    assert lines[1].startswith(r"a \x1b text perplexity 4 3.4903 ± ")
    assert lines[1].endswith(" dense")
    value, difference = text.results["pruned"], text.results["pruned"].difference
    z = difference.value / difference.stderr
    numbers = f"{value.value:.4f} ± 0.0000 +{difference.value:.4f} ± {difference.stderr:.4f} {z:+.1f}"
    assert lines[2] == f"{numbers} pruned"
    assert any(line.startswith("average acc_norm or acc 3 ") for line in lines)
    # Columns without an entry are left out.
    alone = next(metrics.lines(Evaluation(["dense"], None, [], [text_record(windows, {"dense": [-7.0] * 4}, None)])))
    assert alone.split() == ["task", "metric", "n", "value", "model"]
    content = json.loads(evaluation.to_json())
    assert [*content] == ["models", "against", "tasks", "texts"]
    assert content["tasks"][0]["results"]["dense"]["difference"] is None
