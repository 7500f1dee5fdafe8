"""The requests of each rank."""

from collections.abc import Sequence

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


def gathered(scores: Sequence[Score], requests: Sequence[Request], ranks: Ranks) -> list[Score]:
    """The scores of all requests, on all ranks.

    Args:
        scores: those of this rank's requests, in the order of `shares_of`.
        requests: all requests.
        ranks: the ranks, all of which call it.
    """
    found: dict[int, Score] = {}
    for numbers, of_rank in zip(shares_of(requests, ranks), ranks.gather(list(scores)), strict=True):
        found |= zip(numbers, of_rank, strict=True)
    return [found[n] for n in range(len(requests))]
