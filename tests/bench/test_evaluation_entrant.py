"""One evaluation of the race: the harness's own model and ours get the same tasks, and what is kept of them agrees."""

import json

import datasets
import entrant
import lm_eval.evaluator
import make_tasks
import prose
import pytest
import race
from helpers.families import save_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each kind tells of a tiny model, on the tasks that make_tasks.py writes."""
    folder = tmp_path_factory.mktemp("entrants")
    save_model(folder / "model", "llama", max_position_embeddings=512)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        # Two seconds of programs that describe the machine.
        patched.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
        patched.setattr(make_tasks, "USES", 2)
        patched.setattr(make_tasks, "DOCUMENT", range(20, 61))
        make_tasks.write_tasks(folder / "tasks", make_tasks.make_items(prose.passages(["jinja2"]), 3), {})
        for kind in entrant.KINDS:
            paths = [str(folder / name) for name in ("model", "tasks", f"{kind}.json")]
            entrant.main([kind, *paths, "--batch-size", "4"])
    return {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in entrant.KINDS}


def test_both_answer_alike(told):
    differences = race.differences(told["streamed"]["tasks"], told["hf"]["tasks"])
    assert {task: of["requests"] for task, of in differences.items()} == {
        "next_sentence": 12,
        "word_choice": 12,
        "true_sentence": 6,
        "word_cloze": 3,
        "docs_rolling": 2,
    }
    assert all(of_task["largest"] < 1e-3 for of_task in differences.values())
    assert min(told["hf"]["tasks"]["docs_rolling"]["loglikelihoods"])[0] < -100


def test_both_are_near_float64(told):
    exact = told["exact"]["tasks"]
    for kind in ("hf", "streamed"):
        differences = race.differences(told[kind]["tasks"], exact)
        assert 0 < max(of_task["largest"] for of_task in differences.values()) < 1e-3


def test_metrics_of_every_item(told):
    tasks = told["streamed"]["tasks"]
    assert [len(values) for values in tasks["next_sentence"]["metrics"].values()] == [3, 3]
    assert tasks["word_cloze"]["metrics"]["perplexity"] == [ll for (ll,) in tasks["word_cloze"]["loglikelihoods"]]
    of_document = tasks["docs_rolling"]["metrics"]["word_perplexity"]
    assert [sum_of for sum_of, _ in of_document] == [ll for (ll,) in tasks["docs_rolling"]["loglikelihoods"]]
    assert all(20 <= words <= 60 for _, words in of_document)


def test_the_model_that_answers_nothing(told):
    of_tasks = told["nothing"]["tasks"]
    assert of_tasks.keys() == told["hf"]["tasks"].keys()
    assert {ll for task in of_tasks.values() for of_item in task["loglikelihoods"] for ll in of_item} == {0.0}
    assert told["nothing"]["peak_memory"] > 2**20
