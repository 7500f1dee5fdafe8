"""Requests are packed into rows that hold each token once, and all requests."""

import random

import numpy as np
import pytest
import torch

from sparsefw.evaluation import Request
from sparsefw.evaluation.packing import BRANCHES, SHARED_TOKENS, Sharing, pack, padded_length, rows_of, tree_batch


def drawn(seed, count=60):
    """Requests of which many begin alike."""
    draw = random.Random(seed)
    stems = [[draw.randrange(5) for _ in range(draw.randint(1, 30))] for _ in range(6)]
    requests = []
    for _ in range(count):
        read = draw.choice(stems)[: draw.randint(1, 30)] + [draw.randrange(5) for _ in range(draw.randint(0, 6))]
        requests.append(Request(read, [draw.randrange(5) for _ in range(draw.randint(1, len(read)))]))
    return requests


def path_to(row, place):
    path = [place]
    while row.parents[path[-1]] >= 0:
        path.append(row.parents[path[-1]])
    return path[::-1]


@pytest.mark.parametrize("sharing", Sharing)
@pytest.mark.parametrize("seed", range(5))
def test_every_request_is_a_branch_of_one_row(sharing, seed):
    requests = drawn(seed)
    found = {}
    for row in rows_of(requests, sharing):
        for number, places in row.answers.items():
            assert number not in found
            found[number] = [row.tokens[place] for place in path_to(row, places[-1])]
            assert path_to(row, places[-1])[-len(places) :] == list(places)
            assert len(places) == len(requests[number].targets)
    assert found == {n: list(request.read) for n, request in enumerate(requests)}


@pytest.mark.parametrize("seed", range(5))
def test_what_a_row_may_hold(seed):
    requests = drawn(seed)
    for row in rows_of(requests, Sharing.NOTHING):
        assert len({bytes(requests[n].read) for n in row.answers}) == 1
    for row in rows_of(requests, Sharing.BEGINNINGS):
        assert not row.branches
    trees = rows_of(requests, Sharing.BRANCHES)
    assert any(row.branches for row in trees)
    for row in trees:
        deepest = max(len(requests[n].read) for n in row.answers)
        assert len(row.tokens) <= BRANCHES * deepest
        assert not row.branches or len(path_to(row, SHARED_TOKENS)) == SHARED_TOKENS + 1 or deepest <= SHARED_TOKENS


def test_more_sharing_computes_fewer_tokens():
    requests = drawn(0)
    tokens = [sum(len(row.tokens) for row in rows_of(requests, sharing)) for sharing in Sharing]
    assert tokens[0] > tokens[1] > tokens[2]


def test_branches_are_no_longer_than_local_attention_reads():
    requests = [Request([*range(12), n], [n]) for n in range(4)]
    assert any(row.branches for row in rows_of(requests, Sharing.BRANCHES, 13))
    assert not any(row.branches for row in rows_of(requests, Sharing.BRANCHES, 12))


def test_the_beginning_of_another_request_is_in_its_row():
    requests = [Request([1, 2, 3, 4], [5]), Request([1, 2], [9]), Request([1, 2, 3, 4], [6, 7])]
    (row,) = rows_of(requests, Sharing.BEGINNINGS)
    assert list(row.tokens) == [1, 2, 3, 4]
    assert {n: list(places) for n, places in row.answers.items()} == {0: [3], 1: [1], 2: [2, 3]}


def test_a_row_is_padded_by_a_sixteenth_at_most():
    for length in range(1, 5000):
        padded = padded_length(length)
        assert length <= padded <= length + length / 16
    # A length of its own for each would leave most micro-batches small.
    assert len({padded_length(length) for length in range(1, 2049)}) < 140


def test_rows_are_not_padded_beyond_the_positions_of_a_model():
    (group,) = pack([Request([*range(37)], [1])], Sharing.BEGINNINGS, most=37)
    assert group.length == 37
    assert padded_length(36, 37) == 36
    assert padded_length(34, 37) == padded_length(34) == 34
    # The positions of a tree are fewer than its tokens.
    assert padded_length(39, 37) == padded_length(39) == 40


def test_groups_are_of_one_length_and_the_longest_comes_first():
    groups = pack(drawn(1), Sharing.BRANCHES)
    lengths = [group.length for group in groups]
    assert lengths == sorted(lengths, reverse=True)
    for group in groups:
        assert {row.branches for row in group.rows} == {group.trees}
        for size in (1, 3, 100):
            assert sum(batch.windows for batch in group.split(size)) == len(group.rows)


def test_a_token_of_a_tree_attends_to_its_branch_alone():
    requests = [Request([1, 2, 3, 4, 5, 6, 7, 8, 10, 11], [0]), Request([1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 22], [0])]
    rows = rows_of(requests, Sharing.BRANCHES)
    batch = tree_batch(rows, 16, torch.float32)
    mask, positions = batch.kwargs["attention_mask"][0, 0], batch.kwargs["position_ids"][0]
    for place in range(len(rows[0].tokens)):
        path = path_to(rows[0], place)
        assert torch.nonzero(mask[place] == 0).flatten().tolist() == path
        assert positions[place] == len(path) - 1
    # Padding attends to itself, so that no sum of probabilities is 0 / 0.
    for place in range(len(rows[0].tokens), 16):
        assert torch.nonzero(mask[place] == 0).flatten().tolist() == [place]
    assert mask[0, 1] == torch.finfo(torch.float32).min


def test_tokens_take_four_bytes():
    request = Request(np.arange(1000).tolist(), [1])
    assert request.read.itemsize == 4
