"""Shares of ranks: equal, in units, and whole things by cost."""

import itertools
import random

import pytest

from sparsefw.ranks import balanced, shares


@pytest.mark.parametrize("total", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("unit", [1, 64])
def test_shares_cover_all_and_are_equal(total, count, unit):
    parts = shares(total, count, unit)
    assert [n for part in parts for n in range(total)[part]] == list(range(total))
    assert all(part.start % unit == 0 or part.start == total for part in parts)
    sizes = [-(-(part.stop - part.start) // unit) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_balanced_by_brute_force():
    draw = random.Random(0)
    for _ in range(50):
        costs = [draw.randrange(1, 20) for _ in range(7)]

        def work(owners, costs=costs):
            return max(sum(c for c, o in zip(costs, owners, strict=True) if o == n) for n in range(3))

        owners = balanced(costs, 3)
        least = min(map(work, itertools.product(range(3), repeat=7)))
        # Graham's bound for three ranks: 4/3 - 1/9.
        assert least <= work(owners) <= 11 / 9 * least
