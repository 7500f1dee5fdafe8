"""Answers of a checkpoint that ranks share, and after an interruption."""

import json
from contextlib import nullcontext

import pytest
from helpers.answering import REQUESTS, interrupt, opened
from helpers.families import save_model
from helpers.ranks import on_ranks
from helpers.requests import check_same

from sparsefw.evaluation.answers import Budget, scores_of
from sparsefw.evaluation.shares import shares_of
from sparsefw.ranks import Ranks


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_the_requests(count, llama, answers):
    for of_rank in on_ranks(count, answers_on, llama):
        check_same(of_rank, answers)


def answers_on(ranks, folder):
    return scores_of(folder, REQUESTS, Budget(), ranks=ranks)


def test_a_rank_without_a_request(llama, answers):
    for of_rank in on_ranks(3, one_answer, llama):
        assert of_rank == [pytest.approx(answers[0], abs=1e-4)]


def one_answer(ranks, folder, output=None):
    with opened(output, ranks=ranks) if output else nullcontext() as saved:
        return [tuple(score) for score in scores_of(folder, REQUESTS[:1], Budget(), ranks=ranks, saved=saved)]


def test_shares_hold_every_request_once_and_about_as_many_tokens():
    shares = shares_of(REQUESTS, Ranks(0, 3))
    assert sorted(n for share in shares for n in share) == [*range(len(REQUESTS))]
    tokens = [sum(len(REQUESTS[n].read) for n in share) for share in shares]
    assert max(tokens) - min(tokens) < 2 * max(len(request.read) for request in REQUESTS)


def test_ranks_go_on_together(llama, answers, tmp_path, often, monkeypatch):
    output = tmp_path / "out"
    on_ranks(2, stopped_on, llama, output)
    for of_rank, lines in on_ranks(2, go_on, llama, output):
        check_same(of_rank, answers)
        assert any("going on with an unfinished evaluation: 2 of 3" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((output / "b.json").read_text()) == [1]


def stopped_on(ranks, folder, output):
    interrupt(folder, output, 2, ranks)
    ranks.barrier()


def go_on(ranks, folder, output):
    lines = []
    with opened(output, ranks=ranks) as saved:
        found = scores_of(folder, REQUESTS, Budget(), ranks=ranks, saved=saved, say=lines.append)
        saved.finish({"b.json": "[1]"})
    return found, lines


def test_ranks_save_hidden_states_together_or_not_at_all(tmp_path, often):
    """A rank without a request has no hidden states that could not be saved."""
    save_model(tmp_path / "model", "gemma3n_text")
    one, other = on_ranks(2, one_answer, tmp_path / "model", tmp_path / "out")
    assert one == other
