"""How work is shared out over ranks. All ranks compute the same shares, so that nobody has to tell them."""

from collections.abc import Sequence
from itertools import pairwise


def shares(total: int, count: int, unit: int = 1) -> list[slice]:
    """Equal shares of things in a row, as slices in the order of the ranks.

    Args:
        total: number of the things.
        count: number of the ranks.
        unit: shares begin at multiples of this. They differ by one unit at most, and the last one may end within it.
    """
    units = -(-total // unit)
    ends = [min(total, unit * (units * n // count)) for n in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """The rank of each thing that one rank does as a whole: the dearest go first, each to the rank with the least work.

    No rank has more than 4/3 of the work of the best possible distribution (Graham 1969).

    Args:
        costs: the cost of each thing.
        count: number of the ranks.
    """
    work, owners = [0.0] * count, [0] * len(costs)
    for n in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[n] = work.index(min(work))
        work[owners[n]] += costs[n]
    return owners
