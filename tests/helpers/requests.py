"""Requests that are drawn, and answers compared."""

import random

import pytest
import torch
from helpers.families import VOCABULARY

from sparsefw.evaluation import Request, Score, request_of
from sparsefw.evaluation.room import Room
from sparsefw.evaluation.streaming import embed_requests, embedded, pack_for, run_through
from sparsefw.model import BlockModel


def some_requests(seed=0, longest=60):
    """Questions with several answers each, some of many tokens, one that others begin with, and equal ones."""
    draw = random.Random(seed)

    def tokens(least, most):
        return [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(least, most))]

    requests = []
    for _ in range(6):
        context = tokens(9, 30)
        requests += [request_of(context, tokens(1, 9), longest) for _ in range(4)]
    requests.append(Request([*requests[0].read, 5, 6], [7]))
    requests.append(requests[0])
    # Longer than the model reads, and the shortest that there is.
    requests += [request_of(tokens(70, 80), tokens(3, 3), longest), request_of([3], [4], longest)]
    return requests


@torch.no_grad()
def score_requests(model: BlockModel, requests: list[Request], room: Room) -> list[Score]:
    """The answers to requests, in one pass through the blocks."""
    with embedded(model, requests):
        states = embed_requests(model, pack_for(model, requests), room)
    try:
        run_through(model, states, room)
        return states.scores()
    finally:
        states.close()


def check_same(answers, others, within=1e-4):
    for answer, other in zip(answers, others, strict=True):
        assert answer[0] == pytest.approx(other[0], abs=within)
        assert answer[1] == other[1]
