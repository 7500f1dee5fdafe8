"""Trees hold every request, and most tokens once."""

import pytest
import torch
from helpers.requests import REQUESTS

from sparsefw.extras.evaluation.batching import MAX_BRANCHES, batch_of, request_of, trees_of


def test_requests_are_cut_on_the_left():
    assert [*map(list, request_of([1, 2, 3, 4], [5, 6], 3))] == [[3, 4, 5], [5, 6]]


@pytest.mark.parametrize("branch", [True, False])
def test_every_request_is_in_one_tree(branch):
    requests = dict(enumerate(REQUESTS))
    trees = trees_of(requests, branch)
    read = [(number, [tree.tokens[place] for place in path]) for tree in trees for number, path in tree.paths.items()]
    assert sorted(read) == [(number, [*request.read]) for number, request in requests.items()]
    assert any(tree.branched for tree in trees) == branch
    for tree in trees:
        assert len(tree.tokens) <= min(tree.length, MAX_BRANCHES * tree.depth)
        assert tree.length - len(tree.tokens) <= branch * tree.length / 16
    if not branch:
        assert len(trees) == len({(*request.read,) for request in REQUESTS})


def test_a_token_attends_to_its_own_request_alone():
    """And padding to itself: otherwise a sum of probabilities would be 0 / 0."""
    answers = ([10, 11, 0], [20, 21, 22, 0], [20, 21, 30, 0], [40, 0])
    (tree,) = trees_of({n: request_of(range(1, 10), answer, 99) for n, answer in enumerate(answers)}, branch=True)
    assert len(tree.tokens) == 9 + 2 + 3 + 1 + 1
    batch = batch_of([tree], torch.float32)
    mask, positions = batch.kwargs["attention_mask"][0, 0], batch.kwargs["position_ids"][0]

    def seen(place):
        return torch.nonzero(mask[place] == 0).flatten().tolist()

    for path in tree.paths.values():
        assert positions[[*path]].tolist() == [*range(len(path))]
        assert all(seen(place) == [*path[: n + 1]] for n, place in enumerate(path))
    (padded,) = trees_of({n: request_of(range(40), [40 + n] * (2 + n), 99) for n in range(2)}, branch=True)
    mask = batch_of([padded], torch.float32).kwargs["attention_mask"][0, 0]
    assert (len(padded.tokens), padded.length) == (43, 44)
    assert seen(43) == [43]
