"""The tasks of a pruning run."""

import json
import math
import shutil

import pytest
import torch
from helpers.evaluated import NAMES, QUICK, evaluated, pruned
from helpers.ranks import on_ranks
from helpers.tasks import TASKS, write_task
from safetensors.torch import load_file, save_file

import sparsefw
from sparsefw.driver import run as driver_run
from sparsefw.errors import InputError
from sparsefw.evaluation.streaming import RequestStates

pytestmark = pytest.mark.usefixtures("only_these_tasks")


def interrupt_run(place, tasks, output):
    """Begin a run whose tasks do not come through the last block."""
    advance = RequestStates.advance

    def stopping(self, i):
        if i == 2:
            raise KeyboardInterrupt
        advance(self, i)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RequestStates, "advance", stopping)
        with pytest.raises(KeyboardInterrupt):
            pruned(place, tasks, output)


def test_a_run_and_an_evaluation_measure_the_same(place, tasks):
    report = json.loads((place / "pruned/report.json").read_text())
    found = evaluated(place, tasks).evaluation
    dense, method = str(place / "dense"), str(place / "pruned")
    assert found.models == [dense, method]
    for record, of_run in zip(found.tasks, report["tasks"], strict=True):
        assert (record.task, record.metric) == (of_run["task"], of_run["metric"])
        for name, its in ((dense, "dense"), (method, "sparsefw")):
            assert record.results[name].value == pytest.approx(of_run["results"][its]["value"], rel=1e-5)
    (text,) = found.texts
    (of_run,) = report["evaluation"]
    assert text.results[dense].value == pytest.approx(of_run["perplexity"]["dense"], rel=1e-5)
    assert text.results[method].value == pytest.approx(of_run["perplexity"]["sparsefw"], rel=1e-5)
    assert text.results[method].difference.value == pytest.approx(
        text.results[method].value - text.results[dense].value
    )


def test_a_run_tells_of_its_tasks(place, tasks):
    from sparsefw.report import read_report

    report = read_report(place / "pruned/report.json")
    assert {record.task for record in report.tasks} == {*NAMES}
    assert {name for record in report.tasks for name in record.results} == {"dense", "wanda", "sparsefw"}
    assert "tiny_choices" in (place / "pruned/report.html").read_text()


def test_a_run_whose_answers_overflow_has_no_metrics(place, tasks, tmp_path):
    """Without a word, comparisons of NaN would choose among the answers. What was pruned is not lost for that."""
    shutil.copytree(place / "dense", tmp_path / "dense")
    for path in (tmp_path / "dense").glob("*.safetensors"):
        if "model.norm.weight" in (tensors := load_file(path)):
            save_file(tensors | {"model.norm.weight": torch.full((32,), 3e38)}, path, {"format": "pt"})
    given = {"dataset": str(place / "text.txt"), "tasks": NAMES, "include_path": tasks} | QUICK
    found = sparsefw.prune(tmp_path / "dense", tmp_path / "out", **given).report.tasks
    assert {record.task for record in found} == {*NAMES}
    for record in found:
        assert all(math.isnan(result.value) for result in record.results.values())
        assert all(result.stderr is result.difference is None for result in record.results.values())


def test_a_run_refuses_a_task_whose_metrics_fail_before_it_prunes(place, tmp_path, monkeypatch):
    config, documents = TASKS["tiny_choices"]
    write_task(tmp_path, "broken", config | {"metric_list": [{"metric": "f1"}]}, documents)
    monkeypatch.setattr(driver_run, "prune_model", None)
    given = {"dataset": str(place / "text.txt"), "tasks": ["broken"], "include_path": tmp_path} | QUICK
    with pytest.raises(InputError, match=r"^task broken: no metrics can be made of its answers: "):
        sparsefw.prune(place / "dense", tmp_path / "out", **given)


def test_an_interrupted_run_ends_with_the_same_tasks(place, tasks, tmp_path):
    interrupt_run(place, tasks, tmp_path / "out")
    result = pruned(place, tasks, tmp_path / "out")
    report = json.loads((place / "pruned/report.json").read_text())
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["tasks"] == report["tasks"]
    assert [record.task for record in result.tasks] == [record["task"] for record in found["tasks"]]


def test_other_tasks_are_other_input(place, tasks, tmp_path):
    interrupt_run(place, tasks, tmp_path / "out")
    with pytest.raises(InputError, match="what --tasks ask"):
        pruned(place, tasks, tmp_path / "out", limit=2)


def test_ranks_of_a_run_measure_the_same_tasks(place, tasks, tmp_path):
    report = json.loads((place / "pruned/report.json").read_text())
    on_ranks(2, run_on, place, tasks, tmp_path / "out")
    found = json.loads((tmp_path / "out/report.json").read_text())
    for record, of_one in zip(found["tasks"], report["tasks"], strict=True):
        dense, its = (x["results"]["dense"]["value"] for x in (record, of_one))
        assert dense == pytest.approx(its, rel=1e-5)


def run_on(ranks, place, tasks, output):
    from sparsefw.driver import CheckpointJob, Output, run_job
    from sparsefw.inputs import Inputs
    from sparsefw.solver import PruneConfig

    text = str(place / "text.txt")
    inputs = Inputs(
        model=str(place / "dense"), dataset=text, nsamples=4, seqlen=32, evaluate=(text,), eval_windows=3,
        tasks=NAMES, include_path=str(tasks),
    )  # fmt: skip
    config = PruneConfig(sparsity="0.5", steps=2, reconstruct=0, kernel="torch", compare=("wanda",))
    run_job(CheckpointJob(inputs, config, Output(output), place / "dense"), lambda line: None, False, ranks)
