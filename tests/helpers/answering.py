"""Passes of requests through a checkpoint, and their interruptions."""

import pytest
from helpers.requests import some_requests

from sparsefw.evaluation.answers import Budget, scores_of
from sparsefw.evaluation.saved import Saved
from sparsefw.evaluation.streaming import RequestStates
from sparsefw.ranks import ALONE

REQUESTS = some_requests()


def opened(output, identity="same", restart=False, ranks=ALONE, say=lambda line: None):
    return Saved(output, {"what it is": identity}, restart, say, ranks)


class Stop(Exception):
    pass


def interrupt(folder, output, block, ranks=ALONE, say=lambda line: None, requests=REQUESTS):
    """Begin a pass whose requests do not come through a block."""
    with pytest.MonkeyPatch.context() as patched, opened(output, ranks=ranks) as saved:
        interrupted_at(patched, block)
        with pytest.raises(Stop):
            scores_of(folder, requests, Budget(), ranks=ranks, saved=saved, say=say)


def interrupted_at(monkeypatch, block):
    """From now on, the requests do not come through this block."""
    advance = RequestStates.advance

    def stopping(self, i):
        if i == block:
            raise Stop
        advance(self, i)

    monkeypatch.setattr(RequestStates, "advance", stopping)
