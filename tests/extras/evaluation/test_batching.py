"""Trees hold every request, and each beginning of requests once. test_streaming.py has their masks."""

import pytest
from helpers.requests import REQUESTS

from sparsefw.extras.evaluation.batching import MAX_BRANCHES, request_of, trees_of


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
        beginnings = {tuple(path[: n + 1]) for path in tree.paths.values() for n in range(len(path))}
        assert len(tree.tokens) == len(beginnings)
    if not branch:
        assert len(trees) == len({(*request.read,) for request in REQUESTS})
