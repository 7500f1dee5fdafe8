"""The race against the harness's own model: who runs when, what is compared, the table."""

import json

import pytest
import race
from race import Entrant

SECONDS = {1: 30.0, 4: 10.0, 8: 20.0}


def answers(first, acc=0.5):
    """What entrant.py tells of two tasks."""
    return {
        "choices": {"loglikelihoods": [[first, -2.0], [-3.0, -4.0]], "results": {"acc": acc}},
        "rolling": {"loglikelihoods": [[-100.0]], "results": {"word_perplexity": 9.0}},
    }


@pytest.fixture
def run(monkeypatch):
    """Races entrants that take as long as `SECONDS` says; returns the results, and who ran in turn."""
    clock = [0.0]
    monkeypatch.setattr(race.time, "perf_counter", lambda: clock[0])
    launched, kept = [], []

    def launch(entrant):
        launched.append(entrant)
        clock[0] += SECONDS[entrant.batch_size] if entrant.kind == "hf" else 5.0
        first = {"hf": -1.0, "exact": -1.5, "streamed": -1.25, "frugal": -1.25, "nothing": 0.0}[entrant.kind]
        peak = {"hf": 50, "exact": 90, "streamed": 14, "frugal": 12, "nothing": 10}[entrant.kind] * race.MIB
        return {"seconds_behind_imports": 1.0, "peak_memory": peak, "threads": 2, "tasks": answers(first)}

    results = race.race([1, 4, 8], 2, True, launch, lambda results: kept.append(len(results["runs"])))
    assert kept == list(range(1, len(launched) + 1))
    return results, launched


def test_all_batch_sizes_run_once_and_then_the_fastest_in_turn_with_ours(run):
    results, launched = run
    nothing, streamed, frugal = Entrant("nothing"), Entrant("streamed"), Entrant("frugal")
    tried = [entrant for size in (1, 4, 8) for entrant in (Entrant("hf", size), streamed)]
    assert launched == [nothing, *tried, *[Entrant("hf", 4), streamed, frugal, nothing] * 2, Entrant("exact")]
    assert results["fastest"] == "hf, batch size 4"
    assert [run["seconds"] for run in results["runs"][:4]] == [5.0, 30.0, 5.0, 10.0]


def test_answers_of_each_two_are_compared(run):
    results, _ = run
    largest = {pair: of_tasks["choices"]["largest"] for pair, of_tasks in results["differences"].items()}
    assert largest["hf, batch size 1 - streamed"] == largest["streamed - hf, batch size 8"] == 0.25
    assert largest["hf, batch size 1 - hf, batch size 4"] == 0.0
    assert largest["hf, batch size 8 - exact"] == 0.5
    assert len(largest) == 6 * 5 // 2
    compared = results["differences"]["streamed - exact"]
    assert compared["choices"] == {"requests": 4, "largest": 0.25, "metrics": {"acc": [0.5, 0.5]}}
    assert compared["rolling"] == {"requests": 1, "largest": 0.0, "metrics": {"word_perplexity": [9.0, 9.0]}}


def test_accuracies_that_differ_are_named(run):
    results, _ = run
    results["differences"] = {"one - other": race.differences(answers(-1.0, 0.75), answers(-1.5))}
    results["differences"] |= {"one - one": race.differences(answers(-1.0), answers(-1.0))}
    head, _, unequal, equal = race.table(results | {"weights": 40 * race.MIB}).splitlines()[-4:]
    assert head.startswith("| largest difference, nats | choices, 4 requests | rolling, 1 requests |")
    assert unequal == "| one - other | 5.0e-01 | 0.0e+00 | choices acc: 0.7500, 0.5000 |"
    assert equal == "| one - one | 0.0e+00 | 0.0e+00 | none |"


def test_answers_to_other_requests_are_refused():
    fewer = answers(-1.0)
    fewer["choices"]["loglikelihoods"].pop()
    with pytest.raises(ValueError, match="zip"):
        race.differences(answers(-1.0), fewer)


def test_table(run):
    results, _ = run
    lines = race.table(results | {"weights": 40 * race.MIB}).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[2:8]}
    assert cells["hf, batch size 4"] == ["3", "10.0 (10.0 to 10.0)", "1.0", "50", "40", "1.00"]
    assert cells["streamed"] == ["5", "5.0 (5.0 to 5.0)", "1.0", "14", "4", "0.10"]
    assert cells["frugal"][-2:] == ["2", "0.05"]
    assert cells["nothing"][-2:] == ["0", "0.00"]


def test_results_name_the_model_and_the_tasks(tmp_path, monkeypatch, capsys):
    model, tasks, results = tmp_path / "tiny", tmp_path / "tasks", tmp_path / "race.json"
    model.mkdir()
    tasks.mkdir()
    (model / "model.safetensors").write_bytes(b"12345")
    (tasks / "sources.json").write_text('{"versions": {}}')

    def launch(entrant):
        return {"seconds_behind_imports": 1.0, "peak_memory": 1, "threads": 1, "tasks": answers(-1.0)}

    monkeypatch.setattr(race, "launch_apart", lambda model, tasks, limit: launch)
    race.main([str(model), str(tasks), "--results", str(results), "--batch-sizes", "2", "--rounds", "1"])
    told = json.loads(results.read_text())
    assert (told["model"], told["weights"], told["fastest"]) == ("tiny", 5, "hf, batch size 2")
    printed = capsys.readouterr().out
    race.main(["--table", "--results", str(results)])
    assert printed.endswith(capsys.readouterr().out)
