"""take_rows: copy some rows of another matrix, in place. A program works on a few rows.

    X[taken] = Y[taken]         X, Y (rows, d)     taken (rows,) bool

The operation is memory-bound. Rows that are not taken are neither read nor written, and the host does not wait for
their number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import columns, load
from .launch import BOOL, FLOATS, check_matrix, check_rows, interpreter_tile, launch_rows, platform, row_strides, warps
from .operation import ALL, Arguments, Cost, Size, launch, metadata, operation


def reference(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """Compute the operation in plain torch."""
    X[taken] = Y[taken]


def cost(X: Tensor) -> Cost:
    """Read Y and write X, as if every row were taken."""
    return Cost(0, 2 * X.nbytes)


def example(size: Size) -> Arguments:
    """Take every row of a weight."""
    X = size.weight()
    return dict(X=X, Y=size.weight(seed=1), taken=torch.ones_like(X[:, 0], dtype=torch.bool))


def configuration(rows: int, d: int) -> dict[str, int]:
    """Choose tile sizes and launch options."""
    if platform() == "interpreter":
        return interpreter_tile(rows, d)
    BLOCK_D = min(triton.next_power_of_2(d), 4096)
    # A thread has 8 entries of each matrix.
    BLOCK_R = max(1, 1024 // BLOCK_D)
    return dict(BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=warps(BLOCK_R * BLOCK_D // 256))


@triton.jit(launch_metadata=metadata(cost))
def _take_rows_kernel(X, Y, TAKEN, rows, d, stride_x, stride_y, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    taken = tl.load(TAKEN + row, mask=row < rows, other=0).to(tl.int1)
    row = row.to(tl.int64)[:, None]
    for start in range(0, d, BLOCK_D):
        # Rows that are not taken are neither loaded nor stored.
        column, _, moved = columns(start, d, taken, BLOCK_D)
        tl.store(X + row * stride_x + column[None, :], load(Y + row * stride_y, column, moved), mask=moved)


@operation(
    reference, cost, example, writes=("X",), tolerance=0.0,
    launches=(launch(ALL, dtype=torch.float32), launch(ALL, dtype=torch.bool)),
)  # fmt: skip
def take_rows(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """Set X[taken] = Y[taken] in place.

    Args:
        X, Y: (rows, d), of one dtype: fp32 / bf16 / fp16 / bool. The rows of both are contiguous.
        taken: (rows,) bool.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    rows, d = check_matrix("X", X, (*FLOATS, *BOOL))
    check_rows((rows, d), X, (X.dtype,), X=X, Y=Y)
    check_rows((rows,), X, BOOL, taken=taken)
    if X.numel() == 0:
        return
    launch_rows(_take_rows_kernel, configuration(rows, d), X, Y, taken, d=d, **row_strides(x=X, y=Y))
