"""The race against the harness's own model: who runs when, what is compared."""

import datasets
import lm_eval.evaluator
import make_tasks
import prose
import pytest
import race
from helpers.families import save_model

SECONDS = {"hf:1": 30.0, "hf:4": 10.0, "streamed": 5.0}


def answers(first):
    return {
        "choices": {"loglikelihoods": [first, -2.0], "metrics": {"acc": 0.5}},
        "rolling": {"loglikelihoods": [-100.0], "metrics": {"word_perplexity": 9.0}},
    }


def test_all_run_in_turn_and_are_compared(capsys):
    launched = []

    def launch(kind):
        launched.append(kind)
        run = {"seconds": SECONDS[kind], "peak_memory": 2**20}
        return run | {"tasks": answers({"streamed": -1.25}.get(kind, -1.0))}

    results = race.race([*SECONDS], 2, launch)
    assert launched == [*SECONDS] * 2
    assert results["ratio"] == 0.5
    assert {pair: of["choices"]["nats"] for pair, of in results["differences"].items()} == {
        "hf:1 - hf:4": 0.0, "hf:1 - streamed": 0.25, "hf:4 - streamed": 0.25
    }  # fmt: skip
    assert results["differences"]["hf:1 - streamed"]["rolling"]["metrics"] == {"word_perplexity": [9.0, 9.0]}
    assert capsys.readouterr().out.count("\n") == 6


def test_answers_to_other_requests_are_refused():
    fewer = answers(-1.0)
    fewer["choices"]["loglikelihoods"].pop()
    with pytest.raises(ValueError, match="zip"):
        race.differences(answers(-1.0), fewer)


@pytest.mark.slow
def test_both_answer_alike(tmp_path, monkeypatch):
    """On the tasks that make_tasks.py writes."""
    save_model(tmp_path / "model", "llama", max_position_embeddings=512)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Two seconds of programs that describe the machine.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
    monkeypatch.setattr(make_tasks, "USES", 2)
    monkeypatch.setattr(make_tasks, "DOCUMENT", range(20, 61))
    make_tasks.write_tasks(tmp_path / "tasks", make_tasks.make_items(prose.passages(["jinja2"]), 3), {})
    told = {kind: race.evaluate(kind, tmp_path / "model", tmp_path / "tasks", None) for kind in ("hf:4", "streamed")}
    counts = {"next_sentence": 12, "word_choice": 12, "true_sentence": 6, "word_cloze": 3, "docs_rolling": 2}
    assert {task: len(of["loglikelihoods"]) for task, of in told["hf:4"].items()} == counts
    for of_task in race.differences(told["hf:4"], told["streamed"]).values():
        assert of_task["nats"] < 1e-3
        for one, other in of_task["metrics"].values():
            assert one == pytest.approx(other, rel=1e-4)
