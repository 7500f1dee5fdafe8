"""The suite: a model is measured once, and what a pruned model loses is a mean with its error."""

import json
import math

import make_tasks
import pytest
import suite
from helpers.families import save_model


def test_measure(tmp_path, capsys, monkeypatch):
    """The same weights are measured once, and others differ from them."""
    monkeypatch.setattr(suite, "SEQLEN", 32)
    (tmp_path / "choose_prose.txt").write_text("".join(f"{n} is a number, and so is {n * n}.\n" for n in range(100)))
    item = {"context": "", "choices": ["One is a number.", "A number is one."], "label": 0}
    make_tasks.write_tasks(tmp_path, "choose", {"true_sentence": [item] * 3})
    models = [str(save_model(tmp_path / f"model{n}", "llama", num_hidden_layers=n)) for n in (1, 2)]
    command = ["measure", str(tmp_path), *models, "--dense", models[0], "--half", "choose", "--windows", "2"]
    suite.main(command)
    found = json.loads((tmp_path / "suite.json").read_text())["choose"]
    dense, other = (found[model] for model in models)
    assert dense["ratio"] == [1, 0]
    assert math.isclose(other["ratio"][0], other["perplexity"]["choose_prose"] / dense["perplexity"]["choose_prose"])
    assert set(other["accuracy"]) == {"choose_true_sentence"}
    assert f"| {models[1]} | " in capsys.readouterr().out
    monkeypatch.setattr(suite, "window_losses_of", None)
    suite.main(command)


def test_both_means():
    """The mean of the ratios of perplexities, and that of the shares that tasks lose of what is above chance."""
    dense = {"txt": {"a": [-1.0, -3.0], "b": [-2.0, -2.0]}, "jsonl": {"h_true_sentence": [1.0, 1.0, 1.0, 0.0]}}
    pruned = {"txt": {"a": [-2.0, -3.0], "b": [-2.5, -2.5]}, "jsonl": {"h_true_sentence": [1.0, 0.0, 1.0, 0.0]}}
    found = suite.compared(pruned, dense)
    assert found["perplexity"] == {"a": math.exp(2.5), "b": math.exp(2.5)}
    # The windows of b lose alike. Those of a lose 1 and 0: a standard error of 1/2, for two texts 1/4.
    assert found["ratio"] == pytest.approx([math.exp(0.5), math.exp(0.5) / 4])
    # One item of four is lost: 1/4 of the accuracy, of which 3/4 - 1/2 are above chance.
    assert found["lost"] == pytest.approx((1.0, 1.0))
