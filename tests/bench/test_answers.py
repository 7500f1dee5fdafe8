"""The sweep's classes answer requests, and mistakes show."""

import pytest
from classes import answers
from classes.answers import answers_of_whole, drawn_requests, examine_answers
from classes.examine import REFUSED, WORKS, WRONG, write_source
from classes.tiny_model import cases

from sparsefw.evaluation import Score

CASES = {case.model_type: case for case in cases()}

# Each is here for a property.
KINDS = {
    "cpmant": ("NOTHING", "embeds a prompt of its own before the text"),
    "prophetnet": ("NOTHING", "predicts several tokens at each position"),
    "llama4_text": ("BRANCHES", "attends to chunks of the text"),
}


@pytest.mark.parametrize("model_type", KINDS)
def test_class_works(model_type, tmp_path):
    row = examine_answers(CASES[model_type], tmp_path)
    assert (row["outcome"], row["reason"]) == (WORKS, "")
    assert row["sharing"] == KINDS[model_type][0]
    assert 0 < row["difference"] < 1e-4


def test_class_that_is_refused(tmp_path):
    row = examine_answers(CASES["blt"], tmp_path)
    assert row["outcome"] == REFUSED
    assert "BltForCausalLM" in row["reason"]


class TestMistakes:
    def examined(self, monkeypatch, folder, change):
        """The row where a function changes the answers."""
        scores_of = answers.scores_of

        def changed(*args):
            scores = scores_of(*args)
            scores[3] = change(scores[3])
            return scores

        monkeypatch.setattr(answers, "scores_of", changed)
        row = examine_answers(CASES["gpt2"], folder)
        return row["outcome"], row["reason"]

    def test_log_likelihood(self, monkeypatch, tmp_path):
        change = lambda score: Score(score.loglikelihood + 2e-3, score.greedy)  # noqa: E731
        outcome, reason = self.examined(monkeypatch, tmp_path, change)
        assert outcome == WRONG
        assert reason.startswith("request 3: -")

    def test_flag(self, monkeypatch, tmp_path):
        change = lambda score: Score(score.loglikelihood, not score.greedy)  # noqa: E731
        outcome, reason = self.examined(monkeypatch, tmp_path, change)
        assert (outcome, reason) == (WRONG, "request 3: greedy is True, of plain transformers False")

    def test_sharing_in_half_precision(self, monkeypatch, tmp_path):
        sharings = iter(["BRANCHES", "NOTHING"])
        monkeypatch.setattr(answers, "sharing_in", lambda *args: next(sharings))
        row = examine_answers(CASES["gpt2"], tmp_path)
        assert (row["outcome"], row["reason"]) == (WRONG, "shares NOTHING in bf16, and BRANCHES in fp32")


def test_flags_that_could_be_either(tmp_path, monkeypatch):
    *_, model, _ = write_source(CASES["gpt2"], tmp_path)
    requests = drawn_requests()[:3]
    assert not any(either for _, either in answers_of_whole(model, requests))
    monkeypatch.setattr(answers, "CLOSE", 1e9)
    assert all(either for _, either in answers_of_whole(model, requests))
