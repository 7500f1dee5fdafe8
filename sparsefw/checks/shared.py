"""Checks that ranks share: each thing is checked by one of them, and all ranks learn what was found.

So a verdict is made alike on all ranks, and it is that of one process: findings are put together in the order of the
things, whoever has checked them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sparsefw.errors import InputError
from sparsefw.ranks import Ranks

Found = TypeVar("Found")


def share_out(ranks: Ranks, seen: Any, owners: Sequence[int], check: Callable[[int], Found]) -> list[Found]:
    """Check things, each on one rank.

    Args:
        ranks: the processes that share the checks.
        seen: what the things are, as this rank sees them.
        owners: the rank that checks each thing.
        check: called with the number of a thing; what it returns is pickled, and should be small.

    Returns:
        What `check` has returned for each thing, on all ranks.

    Raises:
        InputError: ranks do not see the same.
    """
    mine = {n: check(n) for n, owner in enumerate(owners) if owner == ranks.number}
    everywhere = _gather(ranks, seen, mine)
    return [everywhere[owner][n] for n, owner in enumerate(owners)]


def check_same(ranks: Ranks, seen: Any) -> None:
    """Refuse to go on where ranks do not see the same.

    Raises:
        InputError: on all ranks.
    """
    _gather(ranks, seen, None)


def _gather(ranks: Ranks, seen: Any, found: Found) -> list[Found]:
    everywhere = ranks.gather((seen, found))
    for number, (other, _) in enumerate(everywhere):
        # A rank that sees other files may also be at another check.
        if other != everywhere[0][0]:
            raise InputError(
                f"rank {number} sees other files than rank 0; put the output and its source where all machines see them"
            )
    return [of_rank for _, of_rank in everywhere]
