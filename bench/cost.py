"""The least work of every operation: flops, and bytes that pass between the chip and its memory.

Each operand counts once, as if everything that is read again came from a cache. The formula is in the docstring of each
kernel. The floor of a time is the larger of flops / rate of the unit that does them and bytes / bandwidth.

Arguments named like operands (`E`, `G`, `W`, ...) are the bytes of one entry.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work of one call."""

    flops: int
    bytes: int

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time of a call at these roofs, in seconds."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def product(rows: int, d: int, *, E: int, G: int) -> Cost:
    """U = E G, with U in fp32."""
    return Cost(2 * rows * d * d, rows * d * (E + 4) + d * d * G)


def gram_accumulate(tokens: int, d: int, *, X: int) -> Cost:
    """G += X^T X: products of one triangle, which is read and written."""
    return Cost(tokens * d * (d + 1), tokens * d * X + 4 * d * (d + 1))


def mirror_lower(d: int) -> Cost:
    """One triangle of G is read, the other one is written, without the diagonal."""
    return Cost(0, 4 * d * (d - 1))


def cross_accumulate(tokens: int, rows: int, d: int, *, X: int) -> Cost:
    """B += D^T X, with D in the type of X; B is read and written."""
    return Cost(2 * tokens * rows * d, tokens * (rows + d) * X + 8 * rows * d)


def lmo(rows: int, d: int, *, fixed: bool = False) -> Cost:
    """Scores in, V out; comparisons do not count as flops."""
    return Cost(0, rows * d * (4 + fixed + 1))


def row_step(rows: int, d: int, *, W: int, E: int, fixed: bool = False, target_gap: bool = False) -> Cost:
    """W, M, R, U, V, `fixed` and `target_gap` in; M, R, V, E out."""
    return Cost(30 * rows * d, rows * d * (W + 13 + fixed + 4 * target_gap + 9 + E))


def row_swaps(rows: int, d: int, swaps: int, *, W: int) -> Cost:
    """W, R, V in; R, V out; three rows of G for every swap. Every row is taken to make all swaps."""
    return Cost(30 * swaps * rows * d, rows * d * (W + 10) + 12 * swaps * rows * d)


def conjugate_step(
    rows: int, d: int, *, P: int = 4, mask: bool = True, first: bool = False, last: bool = False
) -> Cost:
    """P, U, Z, R and mask in; Z, R, P out. The first step reads R and mask and writes P; the last writes no P."""
    moved, turned = 0 if first else 20 + P, 0 if last else (4 if first else 0) + P + mask
    return Cost((0 if first else 6) * rows * d + (0 if last else 6) * rows * d, rows * d * (moved + turned))


def removed(rows: int, d: int, *, W: int, E: int, target_gap: bool = False) -> Cost:
    """W, mask and `target_gap` in; E out."""
    return Cost(rows * d, rows * d * (W + 1 + 4 * target_gap + E))


def begin_fit(rows: int, d: int, *, W: int, start: int, E: int) -> Cost:
    """W, start and mask in; Z and E out."""
    return Cost(rows * d, rows * d * (W + start + 1 + 4 + E))


def row_errors(rows: int, d: int, *, W: int, Z: int = 0) -> Cost:
    """W, R and Z in; without Z, `Z` is 0."""
    return Cost(3 * rows * d, rows * d * (W + 4 + Z))


def take_rows(rows: int, d: int, *, X: int) -> Cost:
    """Rows of Y in, rows of X out. Every row is taken."""
    return Cost(0, 2 * rows * d * X)


def candidates(rows: int, d: int, *, support: bool = False) -> Cost:
    """Z, R, mask and `support` in; T and score out."""
    return Cost(6 * rows * d, rows * d * (9 + support + 8))


def bound_scores(rows: int, d: int, *, W: int, target_gap: bool = False, damping: bool = False) -> Cost:
    """W, R and `target_gap` in, and M with `damping`; score out."""
    return Cost(7 * rows * d, rows * d * (W + 8 + 4 * target_gap + 4 * damping))


def bound_sums(rows: int, d: int) -> Cost:
    """score, M and V in."""
    return Cost(5 * rows * d, 9 * rows * d)


def round_mask(rows: int, d: int) -> Cost:
    """Three launches: M in, first out; M, first and saliency in, order out; order in, mask out."""
    return Cost(3 * rows * d, 23 * rows * d)
