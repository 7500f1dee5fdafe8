"""Standard errors of metrics and of differences, against formulas and against a bootstrap."""

import math
import statistics

import numpy as np
import pytest
from helpers.measured import AGGREGATIONS, weighted_perplexity

from sparsefw.evaluation import estimates
from sparsefw.evaluation.estimates import difference, estimate_of

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


# By the harness's name: the metric of many samples (draws, documents) or (draws, documents, 2) at once.
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
        values = [dict(enumerate(x.tolist())) for x in models]
    else:
        models = [np.stack([x, tokens], 1) for x in (dense, pruned)]
        values = [dict(enumerate(map(tuple, x.tolist()))) for x in models]
    one, other = (estimates.FORMULAS[name](x) for x in values)
    for estimate, model in zip((one, other), models, strict=True):
        assert estimate.value == pytest.approx(METRICS[name](model[None])[0], rel=1e-12)
        assert estimate.stderr == pytest.approx(bootstrap(METRICS[name], model), rel=0.06)
    found = difference(other, one)
    assert found.value == other.value - one.value
    assert found.stderr == pytest.approx(bootstrap(METRICS[name], models[1], models[0]), rel=0.06)
    # Not taking documents in pairs would give a number far from it.
    assert not 0.8 < math.hypot(one.stderr, other.stderr) / found.stderr < 1.25


def test_mean_is_the_textbooks():
    dense, pruned = [0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 1, 0, 1]
    one, other = (estimates.mean(dict(enumerate(x))) for x in (dense, pruned))
    assert one.stderr == pytest.approx(statistics.stdev(dense) / math.sqrt(7), rel=1e-12)
    differences = [y - x for x, y in zip(dense, pruned, strict=True)]
    found = difference(other, one)
    assert found.value == pytest.approx(-1 / 7)
    assert found.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(7), rel=1e-12)


def test_mean_of_all_ways_to_draw():
    """Its variance, n / (n - 1) times the variance over all samples that may be drawn, by brute force."""
    x = [0.0, 1.0, 1.0, 5.0]
    means = [statistics.fmean(x[(k // 4**i) % 4] for i in range(4)) for k in range(4**4)]
    assert estimates.mean(dict(enumerate(x))).stderr ** 2 == pytest.approx(4 / 3 * statistics.pvariance(means))


def test_documents_are_paired_by_their_numbers():
    one = estimates.mean({0: 0.0, 1: 1.0, 7: 0.0})
    other = estimates.mean({7: 0.0, 1: 1.0, 0: 0.0})
    found = difference(one, other)
    assert (found.value, found.stderr) == (0, 0)
    assert difference(one, estimates.mean({0: 0.0, 1: 1.0, 2: 0.0})) is None
    assert difference(one, None) is None
    assert difference(None, one) is None


def test_a_single_document_has_no_standard_error():
    one, other = estimates.mean({3: 1}), estimates.mean({3: 0})
    assert one.stderr is None
    assert difference(one, other).stderr is None
    assert difference(one, other).value == 1


def test_the_same_share_of_all_documents_has_no_error():
    """A ratio of sums that are proportional is known exactly, however different the documents are."""
    found = estimates.weighted_perplexity({0: (-20.0, 10), 1: (-2.0, 1), 2: (-200.0, 100)})
    assert found.value == pytest.approx(math.exp(2))
    assert found.stderr == pytest.approx(0, abs=1e-12)


PAIRS = [(-20.0, 10), (-3.0, 1), (-210.0, 100)]


class TestEstimateOf:
    @pytest.mark.parametrize("metric", AGGREGATIONS)
    def test_formulas_are_found(self, metric):
        values = [pair[0] for pair in PAIRS] if metric == "perplexity" else PAIRS
        value = AGGREGATIONS[metric](values)
        assert estimate_of(value, dict(enumerate(values))).value == pytest.approx(value, rel=1e-12)

    def test_numbers_of_numpy(self):
        values = {0: np.float32(0.5), 1: np.bool_(True), 2: np.int64(0)}
        assert estimate_of(0.5, values).value == 0.5

    @pytest.mark.parametrize(
        "values",
        [
            [(1, 0), (1, 1), (0, 0)],  # f1: pairs of truth and answer
            [("a", "b"), ("c", "d")],  # bleu
            [(0, np.array([0.5, 0.5])), (1, np.array([0.1, 0.9]))],  # brier_score
            [0.5, 0.25, 0.125],  # the median is not the mean
            [{"f1": 1.0}, {"f1": 0.0}],
            [],
        ],
    )
    def test_other_metrics_have_none(self, values):
        assert estimate_of(0.25, dict(enumerate(values))) is None

    def test_what_the_task_says_of_its_aggregation_counts(self):
        """The median of 1, 2, 3 is their mean, and has another standard error."""
        values = {0: 1, 1: 2, 2: 3}
        assert estimate_of(2, values, "mean") is not None
        assert estimate_of(2, values, "median") is None
        assert estimate_of(weighted_perplexity(PAIRS), dict(enumerate(PAIRS)), "mean") is None

    def test_no_weights(self):
        assert estimate_of(1.0, {0: (-1.0, 0), 1: (-2.0, 0)}) is None


@pytest.mark.filterwarnings("error")
def test_infinite_likelihoods_have_no_standard_error():
    infinite = {0: -math.inf, 1: -2.0, 2: -3.0}
    by_token = {document: (value, 3) for document, value in infinite.items()}
    for found in (estimates.perplexity(infinite), estimates.weighted_perplexity(by_token)):
        assert (found.value, found.stderr) == (math.inf, None)
        assert difference(found, found).stderr is None
    # Finite, and yet beyond what a number holds.
    assert estimates.perplexity({0: -1e4, 1: -1.1e4}).stderr is None
