"""A request asks a model how likely some tokens are behind others."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, eq=False)
class Request:
    """Tokens that a model reads, and those that it is asked to predict; both are stored in 4 bytes each.

    Attributes:
        read: the tokens that it reads, at least as many as are predicted.
        targets: the tokens that are predicted at the last positions of `read`, at least one.
    """

    read: Sequence[int]
    targets: Sequence[int]

    def __post_init__(self) -> None:
        assert 0 < len(self.targets) <= len(self.read), (len(self.read), len(self.targets))
        # A few-shot benchmark has millions of tokens.
        object.__setattr__(self, "read", array("i", self.read))
        object.__setattr__(self, "targets", array("i", self.targets))


class Score(NamedTuple):
    """The answer to a request.

    Attributes:
        loglikelihood: sum of the log-probabilities of all targets, in nats.
        greedy: whether each target is the most likely token at its position; of equally likely ones the lowest counts.
    """

    loglikelihood: float
    greedy: bool


def request_of(context: list[int], continuation: list[int], max_length: int) -> Request:
    """The request for a continuation behind a context, cut on the left to what the model takes.

    The last token of the continuation is predicted and need not be read. This is the cut of lm-evaluation-harness.

    Args:
        context: tokens before, at least one.
        continuation: tokens that are predicted, at least one and at most `max_length`.
        max_length: most tokens that the model reads.
    """
    return Request((context + continuation)[-(max_length + 1) :][:-1], continuation)


def digest_of(requests: Iterable[Request]) -> str:
    """SHA-256 of requests, in hex."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(array("i", (len(request.read), len(request.targets))).tobytes())
        digest.update(bytes(request.read) + bytes(request.targets))
    return digest.hexdigest()
