"""Requests are packed into rows that hold each token once, and all requests."""

import random
from array import array

import pytest
import torch
from helpers.requests import REQUESTS

from sparsefw.evaluation.rows import (
    BRANCHES,
    SHARED_TOKENS,
    Request,
    Sharing,
    partition,
    request_of,
    rows_of,
    tree_batch,
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


def path_to(row, place):
    path = [place]
    while row.parents[path[-1]] >= 0:
        path.append(row.parents[path[-1]])
    return path[::-1]


def test_requests_are_cut_on_the_left():
    assert request_of([1, 2, 3, 4], [5, 6], 3) == request([3, 4, 5], [5, 6])
    assert request_of([1], [5, 6], 9) == request([1, 5], [5, 6])


@pytest.mark.parametrize("sharing", Sharing)
@pytest.mark.parametrize("seed", range(3))
def test_every_request_is_a_branch_of_one_row(sharing, seed):
    requests, found = drawn(seed), {}
    for row in rows_of(requests, sharing):
        last = {n: place for place, of in sorted(row.targets.items()) for n, _ in of}
        for number, place in last.items():
            assert number not in found
            path, targets = path_to(row, place), len(requests[number].targets)
            predicted = [token for place in path[-targets:] for n, token in row.targets[place] if n == number]
            found[number] = request([row.tokens[place] for place in path], predicted)
    assert [found[n] for n in range(len(requests))] == requests


@pytest.mark.parametrize("seed", range(3))
def test_what_a_row_may_hold(seed):
    requests = drawn(seed)
    rows = {sharing: rows_of(requests, sharing) for sharing in Sharing}
    for row in rows[Sharing.NOTHING]:
        assert len({bytes(requests[n].read) for of in row.targets.values() for n, _ in of}) == 1
    assert not any(row.branches for row in rows[Sharing.BEGINNINGS])
    assert any(row.branches for row in rows[Sharing.BRANCHES])
    for row in rows[Sharing.BRANCHES]:
        assert len(row.tokens) <= BRANCHES * row.depth
        assert not row.branches or len(path_to(row, SHARED_TOKENS)) == SHARED_TOKENS + 1 or row.depth <= SHARED_TOKENS
    tokens = [sum(len(row.tokens) for row in rows[sharing]) for sharing in Sharing]
    assert tokens[0] > tokens[1] > tokens[2]


def test_a_token_of_a_tree_attends_to_its_branch_alone():
    requests = [request([*range(1, 9), 10, 11], [0]), request([*range(1, 9), 20, 21, 22], [0])]
    (row,) = rows_of(requests, Sharing.BRANCHES)
    batch = tree_batch([row], 16, torch.float32)
    mask, positions = batch.kwargs["attention_mask"][0, 0], batch.kwargs["position_ids"][0]
    for place in range(len(row.tokens)):
        path = path_to(row, place)
        assert torch.nonzero(mask[place] == 0).flatten().tolist() == path
        assert positions[place] == len(path) - 1
    # Padding attends to itself, so that no sum of probabilities is 0 / 0.
    for place in range(len(row.tokens), 16):
        assert torch.nonzero(mask[place] == 0).flatten().tolist() == [place]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_ranks_have_every_request_once_and_about_as_many_tokens(count):
    parts = partition(REQUESTS, count)
    assert sorted(n for part in parts for n in part) == [*range(len(REQUESTS))]
    tokens = [sum(len(REQUESTS[n].read) for n in part) for part in parts]
    assert max(tokens) - min(tokens) < 2 * max(len(of.read) for of in REQUESTS)
    assert partition([], count) == [[]] * count
