"""What every operation has to do at least: flops, and bytes that must pass between the chip and its memory.

Each operand counts once, as if the caches held whatever is read again; the docstring of each kernel has the formula.
The larger of the two times, flops over the rate of the unit that does them and bytes over the bandwidth, is the floor.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    flops: int
    bytes: int

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The floor at these roofs."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def product(rows: int, d: int, *, E: int, G: int) -> Cost:
    """U = E G with fp32 U; E and G are the bytes of an entry of each, and so below for other names."""
    return Cost(2 * rows * d * d, rows * d * (E + 4) + d * d * G)


def gradient(rows: int, d: int, *, W: int, G: int) -> Cost:
    """-2 W * ((W * (1 - M)) G); W is read as an operand of the product and again behind it."""
    return Cost(2 * rows * d * d + 4 * rows * d, rows * d * (2 * W + 4 + 4) + d * d * G)


def gram_accumulate(tokens: int, d: int, *, X: int) -> Cost:
    """G += X^T X: one triangle of the products; one triangle of G read, both written."""
    return Cost(tokens * d * (d + 1), tokens * d * X + 2 * d * (d + 1) + 4 * d * d)


def cross_accumulate(tokens: int, rows: int, d: int, *, X: int) -> Cost:
    """B += D^T X, D of the type of X; B is read and written."""
    return Cost(2 * tokens * rows * d, tokens * (rows + d) * X + 8 * rows * d)


def lmo(rows: int, d: int, *, fixed: bool = False) -> Cost:
    """Scores in, V out; comparisons are no flops."""
    return Cost(0, rows * d * (4 + fixed + 1))


def row_step(rows: int, d: int, *, W: int, E: int, fixed: bool = False, lacks: bool = False) -> Cost:
    """W, M, R, U, V, `fixed` and `lacks` in; M, R, V, E out."""
    return Cost(30 * rows * d, rows * d * (W + 13 + fixed + 4 * lacks + 9 + E))


def row_swaps(rows: int, d: int, swaps: int, *, W: int) -> Cost:
    """W, R, V in, R, V out, and for each of the swaps, of which every row is taken to make all, three rows of G."""
    return Cost(30 * swaps * rows * d, rows * d * (W + 10) + 12 * swaps * rows * d)


def conjugate_step(
    rows: int, d: int, *, P: int = 4, mask: bool = True, first: bool = False, last: bool = False
) -> Cost:
    """P, U, Z, R and mask in, Z, R, P out; the first reads R and mask and writes P, the last has no next direction."""
    moved, turned = 0 if first else 20 + P, 0 if last else (4 if first else 0) + P + mask
    return Cost((0 if first else 6) * rows * d + (0 if last else 6) * rows * d, rows * d * (moved + turned))


def convex_update(rows: int, d: int) -> Cost:
    """M, V, R, U in; M, R out."""
    return Cost(6 * rows * d, rows * d * (4 + 1 + 4 + 4 + 8))
