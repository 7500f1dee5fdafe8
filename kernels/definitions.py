"""Define what all implementations of the operations share: precisions, constants, budgets, and the state of a step.

W (rows, d)           weight                             G (d, d)     Gram matrix (Hessian) X^T X of the inputs
M (rows, d)           relaxed mask, entries in [0, 1]    diag (d,)    diagonal of G
V (rows, d)           vertex: a binary mask, bool        fixed (rows, d)    bool, entries that every vertex keeps
target_gap (rows, d)  target minus W, where the masked weights approximate a target other than W; else None
E (rows, d)           target_gap + W * (1 - V): the weights that V removes, plus the target gap
R (rows, d)           (target_gap + W * (1 - M)) G
U (rows, d)           E G, the same product for V
error(M) = sum((target_gap + W * (1 - M)) * R), a quadratic in each row
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")

# A swap is made only if it lowers the row's error by more than this fraction of sum(q) over the entries removed at the
# start. A smaller gain may be rounding, and a search that follows rounding may never end.
LEAST_GAIN = 1e-6

# Conjugate gradients stop in a row once <r, z> is at most this fraction of its first value: later ratios would consist
# of rounding errors.
CONVERGED = 1e-12

# Adam's decay of the mean gradient and of the mean square, and the number that is added to the root of the mean square.
# The squares of gradients below this number are 0 in fp32: the root would be 0, and the step infinite.
DECAYS = (0.9, 0.999)
ADAM_EPSILON = 1e-16


@dataclass
class RowState:
    """State of Frank-Wolfe in some rows, which `row_step` changes in place.

    The rows of every matrix are contiguous (column stride 1), and so are vectors.

    Attributes:
        W: (rows, d) weight, fp32 / bf16 / fp16.
        diag: (d,) fp32, the diagonal of G.
        M, R: (rows, d) fp32, the relaxed mask and its product.
        U: (rows, d) fp32 product of E; undefined after a step.
        V: (rows, d) bool vertex to which U belongs; a step replaces it by the next vertex.
        E: (rows, d), fp32 / bf16 / fp16, the operand of the product; replaced.
        k: number of entries that a vertex keeps in a row, an int or an int tensor (rows,); with `group`, an int, the
            number in a group.
        eta, error: (rows,) fp32, written: the step size, and error(M) after the step, which is NaN if an input is NaN.
        group: 0 for whole rows, else m of n:m, up to 32.
        fixed: (rows, d) bool, True for entries that every vertex keeps; None: no entry.
        target_gap: (rows, d) fp32; None: 0.
        threshold: (rows,) fp32, a score of each row at which the search for the next vertex may start. Any number gives
            the same result. A kernel that searches replaces it by a number that separates kept entries from the others.
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
