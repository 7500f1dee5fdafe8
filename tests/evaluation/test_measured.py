"""Results of the harness as records: values, standard errors, differences, groups, the average."""

import json
import math
import random
import statistics

import datasets
import numpy as np
import pytest
from helpers.measured import harness_of, weighted_perplexity

from sparsefw.errors import InputError
from sparsefw.evaluation.measured import Evaluation, task_records, text_record
from sparsefw.report.tasks import DENSE, average_of

SIZES = {"boolq": 40, "arc_easy": 60, "mmlu_law": 30, "mmlu_art": 90}


def answers(seed: int, **tasks: int) -> dict:
    """Accuracies of documents, and a task of rolling log-likelihoods."""
    rng = np.random.default_rng(seed)
    found = {task: {"acc": rng.integers(0, 2, n).tolist()} for task, n in tasks.items()}
    found["arc_easy"]["acc_norm"] = rng.integers(0, 2, tasks["arc_easy"]).tolist()
    pairs = [(-3.0 * n - float(rng.normal()), n) for n in range(5, 25)]
    found["rolling"] = {"word_perplexity": pairs, "bits_per_byte": pairs}
    return found


@pytest.fixture
def models():
    return {"dense": answers(0, **SIZES), "wanda": answers(1, **SIZES)}


GROUPS = {"mmlu": ["mmlu_law", "mmlu_art"]}


def records_of(models, against=None, **options):
    return task_records({name: harness_of(tasks, GROUPS, **options) for name, tasks in models.items()}, against)


def by_name(records):
    return {(record.task, record.metric): record for record in records}


def paired(models, task, metric) -> tuple[float, float]:
    """Difference and standard error of means, by the textbook."""
    dense, wanda = (models[name][task][metric] for name in ("dense", "wanda"))
    differences = [y - x for x, y in zip(dense, wanda, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def test_records_hold_what_the_harness_says(models):
    records = records_of(models, "dense")
    found = {name: harness_of(tasks, GROUPS) for name, tasks in models.items()}
    assert len(records) == 8
    for record in records:
        for name, harness in found.items():
            results = harness["results"][record.task]
            assert record.results[name].value == results[f"{record.metric},none"]
            if (stderr := results[f"{record.metric}_stderr,none"]) != "N/A":
                assert record.results[name].stderr == stderr
    record = by_name(records)["boolq", "acc"]
    assert (record.documents, record.shots, record.version, record.filter) == (40, 5, "1.0", "none")
    assert record.higher_is_better is True
    assert by_name(records)["rolling", "word_perplexity"].higher_is_better is False
    assert (by_name(records)["mmlu", "acc"].version, by_name(records)["mmlu", "acc"].documents) == ("", 120)


def test_differences(models):
    records = by_name(records_of(models, "dense"))
    for task, metric in (("boolq", "acc"), ("arc_easy", "acc"), ("arc_easy", "acc_norm")):
        record = records[task, metric]
        assert record.results["dense"].difference is None
        found = record.results["wanda"].difference
        assert (found.value, found.stderr) == pytest.approx(paired(models, task, metric), rel=1e-12)
    results = records["rolling", "word_perplexity"].results
    assert results["wanda"].difference.value == pytest.approx(results["wanda"].value - results["dense"].value)
    # The harness has no standard errors of these.
    assert results["dense"].stderr > 0
    assert results["wanda"].difference.stderr > 0
    assert all(record.results["wanda"].difference is None for record in records_of(models))


def test_a_group_comes_before_its_tasks(models):
    order = dict.fromkeys(record.task for record in records_of(models))
    assert [*order] == ["boolq", "arc_easy", "rolling", "mmlu", "mmlu_law", "mmlu_art"]


@pytest.mark.parametrize("by_size", [True, False])
def test_groups(models, by_size):
    records = by_name(records_of(models, "dense", weight_by_size=by_size))
    weights = {"mmlu_law": 30 / 120, "mmlu_art": 90 / 120} if by_size else dict.fromkeys(GROUPS["mmlu"], 0.5)
    pairs = {task: paired(models, task, "acc") for task in weights}
    result = records["mmlu", "acc"].results["wanda"]
    assert result.difference.value == pytest.approx(sum(weights[task] * pairs[task][0] for task in weights))
    assert result.difference.value == pytest.approx(result.value - records["mmlu", "acc"].results["dense"].value)
    expected = math.sqrt(sum((weights[task] * pairs[task][1]) ** 2 for task in weights))
    assert result.difference.stderr == pytest.approx(expected)
    stderrs = [records[task, "acc"].results["wanda"].stderr * weight for task, weight in weights.items()]
    assert result.stderr == pytest.approx(math.hypot(*stderrs))


def test_a_group_that_is_no_mean_of_its_tasks_has_no_difference(models):
    found = {name: harness_of(tasks, GROUPS) for name, tasks in models.items()}
    found["wanda"]["results"]["mmlu"]["acc,none"] += 0.01
    result = by_name(task_records(found, "dense"))["mmlu", "acc"].results["wanda"]
    assert (result.difference, result.stderr) == (None, None)


def test_the_average(models):
    """The mean over tasks and groups of acc_norm, or else acc: not of the tasks in a group, and not of perplexities."""
    records = records_of(models, "dense")
    averaged = [("boolq", "acc"), ("arc_easy", "acc_norm"), ("mmlu", "acc")]
    assert [(record.task, record.metric) for record in records if record.averaged] == averaged
    average, names = average_of(records), by_name(records)
    for name in models:
        measured = [names[key].results[name] for key in averaged]
        assert average[name].value == pytest.approx(statistics.fmean(one.value for one in measured))
        assert average[name].stderr == pytest.approx(math.hypot(*(one.stderr for one in measured)) / 3)
    differences = [names[key].results["wanda"].difference for key in averaged]
    assert average["dense"].difference is None
    assert average["wanda"].difference.value == pytest.approx(average["wanda"].value - average["dense"].value)
    assert average["wanda"].difference.stderr == pytest.approx(math.hypot(*(one.stderr for one in differences)) / 3)


def test_a_group_without_an_aggregate_is_averaged_task_by_task(models):
    found = {name: harness_of(tasks, GROUPS) for name, tasks in models.items()}
    for harness in found.values():
        harness["results"]["mmlu"] = {"name": "mmlu", "alias": "mmlu"}
    averaged = {record.task for record in task_records(found) if record.averaged}
    assert averaged == SIZES.keys()


def test_one_task_has_no_average(models):
    records = task_records({name: harness_of({"boolq": tasks["boolq"]}) for name, tasks in models.items()}, "dense")
    assert [record.averaged for record in records] == [True]
    assert average_of(records) == {}
    assert average_of([]) == {}


def test_corpus_metrics_have_no_difference():
    found = {}
    for name, value in (("dense", 0.5), ("wanda", 0.75)):
        found[name] = harness_of({"cola": {"mcc": [0.0, 1.0, 1.0]}})
        found[name]["samples"]["cola"] = [{"doc_id": i, "filter": "none", "mcc": (1, i % 2)} for i in range(3)]
        found[name]["results"]["cola"] |= {"mcc,none": value, "mcc_stderr,none": 0.1}
    (record,) = task_records(found, "dense")
    assert record.results["wanda"].difference is None
    assert (record.results["wanda"].value, record.results["wanda"].stderr) == (0.75, 0.1)
    assert not record.averaged


def test_filters_are_metrics_of_their_own(models):
    found = {name: harness_of({"boolq": tasks["boolq"]}) for name, tasks in models.items()}
    for harness in found.values():
        harness["samples"]["boolq"] += [{"doc_id": i, "filter": "flipped", "acc": 1 - i % 2} for i in range(40)]
        harness["results"]["boolq"] |= {"acc,flipped": 0.5, "acc_stderr,flipped": "N/A"}
    records = task_records(found, "dense")
    assert [record.filter for record in records] == ["none", "flipped"]
    assert [record.averaged for record in records] == [True, False]
    found = records[0].results["wanda"].difference
    assert (found.value, found.stderr) == pytest.approx(paired(models, "boolq", "acc"))
    flipped = records[1].results["wanda"].difference
    assert (flipped.value, flipped.stderr) == (0, 0)


def test_without_samples(models):
    found = {name: harness_of({"boolq": tasks["boolq"]}) for name, tasks in models.items()}
    for harness in found.values():
        del harness["samples"]
    (record,) = task_records(found, "dense")
    assert record.documents == 40
    assert record.results["wanda"].difference is None


def test_what_is_no_number():
    harness = harness_of({"odd": {"acc": [0, 1]}})
    harness["results"]["odd"] |= {"acc,none": [0.5], "acc_stderr,none": float("nan")}
    (record,) = task_records({"dense": harness})
    assert math.isnan(record.results["dense"].value)
    assert record.results["dense"].stderr is None


def test_texts():
    windows = {
        "dense": [(-30.0, 15), (-33.0, 15), (-20.0, 9)],
        "wanda": [(-40.0, 15), (-45.0, 15), (-27.0, 9)],
    }
    record = text_record("wikitext", "abc", 16, windows, "dense")
    assert (record.windows, record.tokens, record.seqlen) == (3, 39, 16)
    for name, pairs in windows.items():
        assert record.results[name].value == pytest.approx(weighted_perplexity(pairs))
    dense, wanda = record.results["dense"], record.results["wanda"]
    assert dense.difference is None
    assert wanda.difference.value == wanda.value - dense.value
    assert 0 < wanda.difference.stderr < wanda.stderr + dense.stderr


def test_json(models, tmp_path):
    text = text_record("a\ud800", "abc", 16, {name: [(-30.0, 15)] for name in models}, "dense")
    evaluation = Evaluation([*models], DENSE, records_of(models, "dense"), [text])
    written = evaluation.to_json()
    assert Evaluation.from_json(written, tmp_path) == evaluation
    content = json.loads(written)
    assert content["tasks"][0]["results"]["dense"].keys() == {"value", "stderr", "difference"}
    content["tasks"][0]["results"]["dense"]["value"] = "0.5"
    with pytest.raises(InputError, match=r"at `\$\.tasks\[0\]\.results"):
        Evaluation.from_json(json.dumps(content), tmp_path)
    assert evaluation.average == average_of(evaluation.tasks)


def test_the_harness_itself():
    """On documents made here, with models whose answers are drawn."""
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks").TaskManager(include_defaults=False).load(made_tasks())
    found = {
        name: lm_eval.evaluate(drawn_model(lm_eval, seed), tasks, bootstrap_iters=0)
        for seed, name in enumerate(("dense", "wanda"))
    }
    records = by_name(task_records(found, "dense"))
    assert len(records) == 6
    for (task, metric), record in records.items():
        assert record.documents == 24
        for name, harness in found.items():
            assert record.results[name].value == harness["results"][task][f"{metric},none"]
            # The harness computes none without a bootstrap.
            assert (record.results[name].stderr is None) == (metric == "mcc")
        assert record.results["dense"].difference is None
        assert (record.results["wanda"].difference is None) == (metric == "mcc")
    assert records["made_last", "perplexity"].higher_is_better is False
    assert records["made_choice", "acc_norm"].averaged


def made_tasks() -> list[dict]:
    """Tasks of the harness: multiple choice, rolling, and one continuation."""
    documents = [{"text": "words and more " * (1 + i % 5), "label": i % 2, "choices": ["no", "yes"]} for i in range(24)]
    common = {
        "custom_dataset": lambda **_: datasets.DatasetDict({"test": datasets.Dataset.from_list(documents)}),
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "label",
    }
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    own = {
        "made_choice": ({"output_type": "multiple_choice", "doc_to_choice": "choices"}, ("acc", "acc_norm", "mcc")),
        "made_rolling": (rolling, ("word_perplexity", "bits_per_byte")),
        "made_last": ({"output_type": "loglikelihood", "doc_to_target": "yes"}, ("perplexity",)),
    }
    return [
        {"task": name, "metric_list": [{"metric": metric} for metric in metrics]} | common | config
        for name, (config, metrics) in own.items()
    ]


def drawn_model(lm_eval, seed: int):
    """A model of the harness whose log-likelihoods are drawn, request by request."""

    class Drawn(lm_eval.api.model.LM):
        def number(self, *args):
            return random.Random(repr((seed, args))).random()

        def loglikelihood(self, requests):
            return [(-len(r.args[1]) * (1 + self.number(*r.args)), False) for r in requests]

        def loglikelihood_rolling(self, requests):
            return [-len(r.args[0]) * (1 + self.number(*r.args)) for r in requests]

        def generate_until(self, requests):
            raise NotImplementedError

    return Drawn()
