"""Requests that are drawn, and answers of whole models."""

import random
import re

import pytest
import torch
from helpers.families import VOCABULARY
from transformers import AutoModelForCausalLM

from sparsefw.checkpoint.source import inspect
from sparsefw.extras.evaluation.batching import request_of
from sparsefw.extras.evaluation.streaming import scores_of


def _drawn():
    """Questions with several answers each, some of many tokens, one that others begin with, and equal ones."""
    draw, longest = random.Random(0), 60

    def tokens(least, most):
        return [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(least, most))]

    requests = []
    for _ in range(3):
        context = tokens(9, 30)
        requests += [request_of(context, tokens(1, 9), longest) for _ in range(4)]
    requests.append(request_of([*requests[0].read, 5, 6], [7], longest))
    requests.append(requests[0])
    # Longer than the model reads, and the shortest that there is.
    return [*requests, request_of(tokens(70, 80), tokens(3, 3), longest), request_of([3], [4], longest)]


REQUESTS = _drawn()


def answers(folder, requests=REQUESTS, **options):
    """The answers of a checkpoint, one block at a time, and the number of rows that they were computed in."""
    lines = []
    scores = scores_of(inspect(folder), requests, say=lines.append, **options)
    return scores, int(re.findall(r"computed as (\d+) rows", "\n".join(lines))[-1])


@torch.no_grad()
def answers_of_whole(folder, requests=REQUESTS, dtype=torch.float32):
    """The answers of the whole model, one request at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    found = []
    for request in requests:
        logits = model(torch.tensor([[*request.read]])).logits[0, -len(request.targets) :].float()
        targets = torch.tensor([*request.targets])
        total = logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum().item()
        found.append((total, bool((logits.argmax(-1) == targets).all())))
    return found


def check_same(found, others, within=1e-3):
    for answer, other in zip(found, others, strict=True):
        assert answer[0] == pytest.approx(other[0], abs=within)
        assert answer[1] == other[1]
