"""The requests of each rank."""

import math
from collections.abc import Sequence

import torch

from sparsefw.errors import InputError
from sparsefw.evaluation.request import Request, Score
from sparsefw.ranks import Ranks


def shares_of(requests: Sequence[Request], ranks: Ranks) -> list[list[int]]:
    """Numbers of the requests of each rank: those that begin alike stay together, and all ranks have as many tokens."""
    order = sorted(range(len(requests)), key=lambda n: bytes(requests[n].read))
    total, done = sum(len(request.read) for request in requests), 0
    shares: list[list[int]] = [[] for _ in range(ranks.count)]
    for n in order:
        shares[done * ranks.count // total].append(n)
        done += len(requests[n].read)
    return shares


def gathered(
    scores: Sequence[Score], requests: Sequence[Request], ranks: Ranks, model: str, dtype: torch.dtype
) -> list[Score]:
    """The scores of all requests, on all ranks.

    Args:
        scores: those of this rank's requests, in the order of `shares_of`.
        requests: all requests.
        ranks: the ranks, all of which call it.
        model: what has given them, for messages.
        dtype: its dtype.

    Raises:
        InputError: one is NaN, so that a comparison would choose any answer.
    """
    found: dict[int, Score] = {}
    for numbers, of_rank in zip(shares_of(requests, ranks), ranks.gather(list(scores)), strict=True):
        found |= zip(numbers, of_rank, strict=True)
    if none := sum(math.isnan(score.loglikelihood) for score in found.values()):
        raise InputError(
            f"{model}: the log-likelihoods of {none} of {len(found)} requests are NaN, as behind the last block "
            f"numbers are too large for {dtype}; it is of no use"
        )
    return [found[n] for n in range(len(requests))]
