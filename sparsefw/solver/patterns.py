"""Sparsity patterns: what `--sparsity` means, as a number of kept weights per row or per group.

0.6          every row keeps the same number of weights
layer:0.6    one budget for the whole matrix, split over its rows by the warm start
2:4          n kept out of every m consecutive weights of a row
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from sparsefw.errors import InputError, shown
from sparsefw.kernels import cpu

LARGEST_GROUP = 32


@dataclass(frozen=True)
class Pattern:
    """A parsed sparsity pattern.

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


def parse(text: str) -> Pattern:
    """Read a `--sparsity` value.

    Raises:
        InputError: not one of the three forms, a sparsity outside (0, 1), n >= m, or m > 32.
    """
    if match := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text):
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m <= LARGEST_GROUP:
            raise InputError(
                f"--sparsity {shown(text)}: n:m keeps n of every m weights, with 0 < n < m <= {LARGEST_GROUP}"
            )
        return Pattern(text, 1 - Fraction(n, m), "group", m)
    if match := re.fullmatch(r"(layer:)?([0-9]{0,9}(?:\.[0-9]{0,30})?)", text):
        try:
            sparsity = Fraction(match[2])
        except ValueError:
            sparsity = None
        if sparsity is not None:
            if not 0 < sparsity < 1:
                raise InputError(f"--sparsity {text}: the fraction removed lies between 0 and 1, both excluded")
            return Pattern(text, sparsity, "layer" if match[1] else "row")
    raise InputError(f"--sparsity {shown(text)}: expected a fraction (0.6), layer:0.6 or n:m (2:4)")


def check_width(pattern: Pattern, d: int, name: str) -> None:
    """Raise InputError unless rows of d weights divide into the groups of the pattern."""
    if pattern.group and d % pattern.group:
        raise InputError(f"{name}: {d} inputs do not divide into groups of {pattern.group} (--sparsity {pattern.text})")


def kept_in_row(pattern: Pattern, d: int) -> int:
    """Weights that a row of d keeps: d - floor(sparsity d), exact for n:m."""
    return d - int(pattern.sparsity * d)


def kept_in_group(pattern: Pattern) -> int:
    """n of n:m."""
    return pattern.group - int(pattern.sparsity * pattern.group)


def kept_in_layer(pattern: Pattern, rows: int, d: int) -> int:
    """Weights that a whole (rows, d) matrix keeps under one budget."""
    return rows * d - int(pattern.sparsity * rows * d)


def kept(pattern: Pattern, saliency: Tensor) -> int | Tensor:
    """How many weights the LMO keeps: k per row (an int, or a tensor if a layer's budget is split), or n per group.

    Args:
        pattern: the pattern. Callers also pass its `group` to the LMO.
        saliency: (rows, d) fp32 of the warm start. A `layer:` budget goes to its highest entries in the whole
            matrix, and each row keeps the number it got.
    """
    rows, d = saliency.shape
    if pattern.scope == "group":
        return kept_in_group(pattern)
    if pattern.scope == "row":
        return kept_in_row(pattern, d)
    # A NaN shows in the errors, which name the layer.
    highest = cpu.lmo(saliency.reshape(1, -1), kept_in_layer(pattern, rows, d), checked=False)
    return highest.view(rows, d).sum(1)
