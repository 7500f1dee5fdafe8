"""Parse the pattern of sparsity, `--sparsity`.

0.6          60 % of the weights of every row are removed
layer:0.6    60 % of the weights of the matrix are removed; the warm start splits the budget over the rows
2:4          2 of every 4 consecutive weights of a row are kept
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from sparsefw.errors import InputError, option

LARGEST_GROUP = 32


@dataclass(frozen=True)
class Pattern:
    """Pattern of sparsity.

    Attributes:
        text: the pattern as the user wrote it.
        sparsity: fraction of the weights that are removed, in (0, 1).
        scope: the weights that share a budget: those of a "row", of a "layer", or of a "group".
        group: m of n:m, else 0.
    """

    text: str
    sparsity: Fraction
    scope: str
    group: int = 0

    def kept(self, weights: int) -> int:
        """Return how many of this number of weights with one budget are kept. The removed number is rounded down."""
        return weights - int(self.sparsity * weights)


def parse(text: str) -> Pattern:
    """Parse a value of `--sparsity`.

    Raises:
        InputError: the value has another form, the fraction is not between 0 and 1, or not 0 < n < m <= 32.
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
            raise InputError(f"{option('sparsity', text)}: expected a fraction between 0 and 1, both excluded")
        return Pattern(text, sparsity, "layer" if match[1] else "row")
    raise InputError(f"{option('sparsity', text)}: expected a fraction (0.6), layer:0.6 or n:m (2:4)")


def check_width(pattern: Pattern, d: int, name: str) -> None:
    """Raise InputError unless rows of d weights divide into the pattern's groups."""
    if pattern.group and d % pattern.group:
        of = option("sparsity", pattern.text)
        raise InputError(f"{name}: {d} inputs do not divide into groups of {pattern.group} ({of})")


def budget(pattern: Pattern, rows: int, d: int, rows_independent: bool) -> tuple[int, int]:
    """Return how many consecutive weights of a (rows, d) matrix share one budget, and how many of them are kept.

    Under n:m a group has one budget. A fraction is the budget of a row, or of the whole matrix if the scope is "layer"
    or rows depend on each other.
    """
    by_row = pattern.scope == "row" and rows_independent
    width = pattern.group or (d if by_row else rows * d)
    return width, pattern.kept(width)
