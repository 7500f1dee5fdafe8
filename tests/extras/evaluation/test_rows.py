"""Requests are packed into rows that hold each token once, and all requests."""

import random
from array import array

import pytest
import torch
from helpers.requests import REQUESTS

from sparsefw.extras.evaluation.rows import (
    BRANCHES,
    SHARED_TOKENS,
    Request,
    Sharing,
    batch_of,
    partition,
    request_of,
    rows_of,
)


def request(read, targets):
    return Request(array("i", read), array("i", targets))


def drawn(seed, count=60):
    """Requests of which many begin alike."""
    draw = random.Random(seed)
    stems = [[draw.randrange(5) for _ in range(draw.randint(1, 30))] for _ in range(6)]
    requests = []
    for _ in range(count):
        read = draw.choice(stems)[: draw.randint(1, 30)] + [draw.randrange(5) for _ in range(draw.randint(0, 6))]
        requests.append(request(read, [draw.randrange(5) for _ in range(draw.randint(1, len(read)))]))
    return requests


def test_requests_are_cut_on_the_left():
    assert request_of([1, 2, 3, 4], [5, 6], 3) == request([3, 4, 5], [5, 6])
    assert request_of([1], [5, 6], 9) == request([1, 5], [5, 6])


@pytest.mark.parametrize("sharing", Sharing)
@pytest.mark.parametrize("seed", range(3))
def test_every_request_is_a_branch_of_one_row(sharing, seed):
    requests, found = drawn(seed), {}
    for row in rows_of(requests, sharing):
        for number, path in row.paths.items():
            assert number not in found
            assert sorted(path) == [*path]
            found[number] = [row.tokens[place] for place in path]
    assert [found[n] for n in range(len(requests))] == [[*request.read] for request in requests]


@pytest.mark.parametrize("seed", range(3))
def test_what_a_row_may_hold(seed):
    requests = drawn(seed)
    rows = {sharing: rows_of(requests, sharing) for sharing in Sharing}
    for row in rows[Sharing.NOTHING]:
        assert len({bytes(requests[n].read) for n in row.paths}) == 1
    assert not any(row.branches for row in rows[Sharing.BEGINNINGS])
    assert any(row.branches for row in rows[Sharing.BRANCHES])
    for row in rows[Sharing.BRANCHES]:
        assert len(row.tokens) <= BRANCHES * row.depth
        assert all([*path[:SHARED_TOKENS]] == [*range(len(path))][:SHARED_TOKENS] for path in row.paths.values())
    tokens = [sum(len(row.tokens) for row in rows[sharing]) for sharing in Sharing]
    assert tokens[0] > tokens[1] > tokens[2]


def test_a_token_of_a_tree_attends_to_its_branch_alone():
    stem = [*range(1, 10)]
    requests = [request([*stem, *own], [0]) for own in ([10, 11], [20, 21, 22], [20, 21, 30], [40])]
    (row,) = rows_of(requests, Sharing.BRANCHES)
    assert len(row.tokens) == 9 + 2 + 3 + 1 + 1
    batch = batch_of([row], 20, torch.float32)
    mask, positions = batch.kwargs["attention_mask"][0, 0], batch.kwargs["position_ids"][0]
    for path in row.paths.values():
        assert positions[[*path]].tolist() == [*range(len(path))]
        for n, place in enumerate(path):
            assert torch.nonzero(mask[place] == 0).flatten().tolist() == [*path[: n + 1]]
    # Padding attends to itself, so that no sum of probabilities is 0 / 0.
    for place in range(len(row.tokens), 20):
        assert torch.nonzero(mask[place] == 0).flatten().tolist() == [place]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_ranks_have_every_request_once_and_about_as_many_tokens(count):
    parts = partition(REQUESTS, count)
    assert sorted(n for part in parts for n in part) == [*range(len(REQUESTS))]
    tokens = [sum(len(REQUESTS[n].read) for n in part) for part in parts]
    assert max(tokens) - min(tokens) < 2 * max(len(of.read) for of in REQUESTS)
    assert partition([], count) == [[]] * count
