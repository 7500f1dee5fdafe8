"""Define what all implementations of the operations share: precisions, constants, checks, and the state of a step.

W (rows, d)           weight                             G (d, d)     Gram matrix (Hessian) X^T X of the inputs
M (rows, d)           relaxed mask, entries in [0, 1]    diag (d,)    diagonal of G
V (rows, d)           vertex: a binary mask, bool        fixed (rows, d)    bool, entries that every vertex keeps
target_gap (rows, d)  target minus W; None if the target is W
E (rows, d)           target_gap + W * (1 - V): the weights that V removes, plus the target gap
R (rows, d)           (target_gap + W * (1 - M)) G
U (rows, d)           E G: what R is for M, U is for V
error(M) = sum((target_gap + W * (1 - M)) * R), in each row a quadratic function of M
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")

# A swap is made only if it lowers the row's error by more than this fraction of sum(W^2 diag) over the entries that are
# removed before the first swap. A smaller gain may be a rounding error, and such gains may never end.
LEAST_GAIN = 1e-6

# Conjugate gradients stop in a row once <r, z> is at most this fraction of its first value: later step sizes would
# consist of rounding errors.
CONVERGED = 1e-12

# DECAYS: the decay rates of Adam's running means of the gradient and of its square. ADAM_EPSILON is added to the root
# of the mean square. The mean square of tiny gradients is 0 in fp32, and the step would be infinite without it.
DECAYS = (0.9, 0.999)
ADAM_EPSILON = 1e-16


@dataclass
class RowState:
    """State of Frank-Wolfe in some rows. `row_step` updates it in place.

    The rows of every matrix are contiguous (column stride 1), and vectors are contiguous.

    Attributes:
        W: (rows, d) weight, fp32 / bf16 / fp16.
        diag: (d,) fp32, the diagonal of G.
        M, R: (rows, d) fp32, the relaxed mask, and (target_gap + W * (1 - M)) G.
        U: (rows, d) fp32, E G. The caller computes U before a step; after the step U is undefined.
        V: (rows, d) bool, the vertex. A step replaces V by the next vertex.
        E: (rows, d), fp32 / bf16 / fp16, target_gap + W * (1 - V). A step replaces it by that of the next vertex.
        k: the most entries that a vertex keeps in a row, an int or an int tensor (rows,). With `group` it is an int,
            the most entries that a vertex keeps in a group.
        eta, error: (rows,) fp32. A step writes its step size, and after the step sum(W * (1 - M) * R), which is
            error(M) without a target gap. The solver reads it only for NaN, which any NaN of the inputs makes of it.
        group: 0 for whole rows, m for n:m; up to 32.
        fixed: (rows, d) bool, True for entries that every vertex keeps; None: no entry.
        target_gap: (rows, d) fp32, target minus W; None counts as 0.
        threshold: (rows,) fp32, the scores from which a kernel starts its search for the next vertex. They affect its
            time, and never its result. The search replaces them by scores that separate kept entries from removed ones.
            None: the search starts from the range of the scores.
    """

    W: Tensor
    diag: Tensor
    M: Tensor
    R: Tensor
    U: Tensor
    V: Tensor
    E: Tensor
    k: int | Tensor
    eta: Tensor
    error: Tensor
    group: int = 0
    fixed: Tensor | None = None
    target_gap: Tensor | None = None
    threshold: Tensor | None = None


def check_precision(precision: str) -> None:
    """Raise ValueError unless `precision` is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def widened(X: Tensor) -> Tensor:
    """Convert X to fp32. In float64 X stays, so that tests can compute the truth."""
    return X if X.dtype == torch.float64 else X.float()


def round_operand(X: Tensor, precision: str) -> Tensor:
    """Convert X to fp32 (fp64 stays), rounded to the nearest value of `precision`.

    Tensor cores cut the bits off that tf32 lacks, which at most doubles the error.
    """
    check_precision(precision)
    X = widened(X)
    if precision == "ieee":
        return X
    if precision == "tf32x3":
        high = round_operand(X, "tf32")
        return round_operand(X - high, "tf32").add_(high)
    if precision == "bf16":
        return X.bfloat16().to(X.dtype)
    # tf32 has 10 bits of mantissa, fp32 has 23, and fp64 has 52.
    integer, rest = (torch.int32, 13) if X.dtype == torch.float32 else (torch.int64, 42)
    bits = X.view(integer)
    # Round the integer to nearest even above its `rest` lowest bits. A carry into the exponent gives the right result.
    even = (bits >> rest).bitwise_and_(1)
    return even.add_(bits).add_(2 ** (rest - 1) - 1).bitwise_and_(-(2**rest)).view(X.dtype)


def check_budget(shape: torch.Size, k: int | Tensor, group: int) -> None:
    """Raise ValueError unless k entries of every row, or of every `group` consecutive entries, can be kept."""
    rows, d = shape
    if group < 0 or (group and d % group):
        raise ValueError(f"group: expected a divisor of d = {d}, got {group}")
    width = group or d
    if isinstance(k, Tensor):
        if group or k.shape != (rows,) or k.is_floating_point():
            raise ValueError(f"k: expected an int, or {rows} integers where group is 0, got {tuple(k.shape)} {k.dtype}")
    elif not 0 <= k <= width:
        raise ValueError(f"k: expected 0 to {width}, got {k}")
