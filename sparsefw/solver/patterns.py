"""Read the user's pattern of sparsity, `--sparsity`.

0.6          every row keeps the same number of weights
layer:0.6    one budget for the whole matrix, split over its rows by the warm start
2:4          n kept out of every m consecutive weights of a row
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from sparsefw.errors import InputError, option

LARGEST_GROUP = 32


@dataclass(frozen=True)
class Pattern:
    """Sparsity pattern, parsed.

    Attributes:
        text: as the user wrote it.
        sparsity: fraction of the weights removed, in (0, 1).
        scope: what one budget covers: "row", "layer" or "group".
        group: m of n:m, else 0.
    """

    text: str
    sparsity: Fraction
    scope: str
    group: int = 0

    def kept(self, weights: int) -> int:
        """Count the kept weights of a number of weights that share one budget, exact for n:m."""
        return weights - int(self.sparsity * weights)


def parse(text: str) -> Pattern:
    """Read a `--sparsity` value.

    Raises:
        InputError: not one of the three forms, a sparsity outside (0, 1), n >= m, or m > 32.
    """
    if match := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text):
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m <= LARGEST_GROUP:
            raise InputError(
                f"{option('sparsity', text)}: n:m keeps n of every m weights, with 0 < n < m <= {LARGEST_GROUP}"
            )
        return Pattern(text, 1 - Fraction(n, m), "group", m)
    if match := re.fullmatch(r"(layer:)?(?=\.?[0-9])([0-9]{0,9}(?:\.[0-9]{0,30})?)", text):
        sparsity = Fraction(match[2])
        if not 0 < sparsity < 1:
            raise InputError(f"{option('sparsity', text)}: removes a fraction between 0 and 1, both excluded")
        return Pattern(text, sparsity, "layer" if match[1] else "row")
    raise InputError(f"{option('sparsity', text)}: expected a fraction (0.6), layer:0.6 or n:m (2:4)")


def check_width(pattern: Pattern, d: int, name: str) -> None:
    """Raise InputError unless rows of d weights divide into the groups of the pattern."""
    if pattern.group and d % pattern.group:
        of = option("sparsity", pattern.text)
        raise InputError(f"{name}: {d} inputs do not divide into groups of {pattern.group} ({of})")


def budget(pattern: Pattern, rows: int, d: int, rows_independent: bool) -> tuple[int, int]:
    """Count the weights that share a budget in a (rows, d) matrix, and the kept ones among them.

    Weights that share a budget follow each other. Rows that depend on each other share one budget.
    """
    by_row = pattern.scope == "row" and rows_independent
    width = pattern.group or (d if by_row else rows * d)
    return width, pattern.kept(width)
