"""What all implementations of the operations share: precisions, constants, budgets, and the state of a step.

W (rows, d)           weight                             G (d, d)     Gram matrix (Hessian) X^T X of the inputs
M (rows, d)           relaxed mask, entries in [0, 1]    diag (d,)    diagonal of G
V (rows, d)           vertex: a binary mask, bool        fixed (rows, d)    bool, entries that every vertex keeps
target_gap (rows, d)  target minus W, where the masked weights approximate a target other than W; else None
E (rows, d)           weights that V removes, W * (1 - V), plus the target gap
R (rows, d)           (W * (1 - M)) G, plus the target gap's product
U (rows, d)           E G, the same product for V
error(M) = sum(W * (1 - M) * R), one quadratic per row, plus the target gap's share
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")

# A swap is made only if it lowers the row's error by more than this fraction of sum(q) over the entries removed at the
# start. A smaller gain may be rounding, and a search that follows rounding may never end.
LEAST_GAIN = 1e-6

# Conjugate gradients stop in a row once <r, z> is at most this fraction of its first value: the ratios that follow are
# made of rounding errors.
CONVERGED = 1e-12

# Decay of the mean gradient and of the mean square in Adam, and what is added to the root of the latter. The squares of
# smaller gradients are nothing in fp32: the root would be 0, and the step endless.
DECAYS = (0.9, 0.999)
ADAM_EPSILON = 1e-16


@dataclass
class RowState:
    """The state of Frank-Wolfe in some rows, which `row_step` changes in place.

    The rows of every matrix are contiguous (column stride 1), and vectors have no gaps.

    Attributes:
        W: (rows, d) weight, fp32 / bf16 / fp16.
        diag: (d,) fp32, the diagonal of G.
        M, R: (rows, d) fp32, the relaxed mask and its product.
        U: (rows, d) fp32, the product of E; its content is undefined after a step.
        V: (rows, d) bool, the vertex that U belongs to; a step replaces it by the next one.
        E: (rows, d), fp32 / bf16 / fp16, the operand of the product; replaced.
        k: entries that a vertex keeps per row, an int or an int tensor (rows,); with `group`, per group, an int.
        eta, error: (rows,) fp32, written: the step size, and error(M) after the step. A NaN shows in the error.
        group: 0 for whole rows, else m of n:m, up to 32.
        fixed: (rows, d) bool, entries that every vertex keeps; None: none.
        target_gap: (rows, d) fp32; None: 0.
        threshold: (rows,) fp32, a score per row near which the search for the next vertex may start: any number. A
            kernel that searches replaces it by one that separates the entries taken from the others. It changes no
            result. None starts anew.
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
    """Raise ValueError unless k entries of every row (or of every `group` consecutive entries) can be kept."""
    rows, d = shape
    if group < 0 or (group and d % group):
        raise ValueError(f"group: expected a divisor of d = {d}, got {group}")
    width = group or d
    if isinstance(k, Tensor):
        if group or k.shape != (rows,) or k.is_floating_point():
            raise ValueError(f"k: expected an int, or {rows} integers where group is 0, got {tuple(k.shape)} {k.dtype}")
    elif not 0 <= k <= width:
        raise ValueError(f"k: expected 0 to {width}, got {k}")
