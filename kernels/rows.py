"""row_errors and take_rows: compute the error of every row, and copy some rows of another matrix, in one pass each.

    row_errors   sum((W - Z) * R)                       W, Z (rows, d) floating     R (rows, d) fp32
    take_rows    X[taken] = Y[taken], in place          X, Y (rows, d)     taken (rows,) bool

    row_errors   flops = 3 rows d    bytes = rows d (size(W) + 4, + size(Z) with Z)
    take_rows    flops = 0           bytes = 2 d size(X) for every taken row

Each is memory-bound. `row_errors` has a sum in fp32 for every column of a chunk, adds the terms of a row to these sums
chunk by chunk, and then adds the sums in a tree. So the rounding error grows with the number of chunks and not with d.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import columns
from .launch import FLOATS, check, check_matrix, check_rows, on_device, row_stride, row_tile


@triton.jit
def _row_errors_kernel(
    W, Z, R, ERROR, rows, d, stride_w, stride_z, stride_r, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    row = row.to(tl.int64)
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        column, valid_d = columns(start, d, 0, 0, BLOCK_D)
        column = column[None, :]
        valid = valid_r[:, None] & valid_d[None, :]
        e = tl.load(W + row[:, None] * stride_w + column, mask=valid, other=0.0).to(tl.float32)
        if Z is not None:
            e -= tl.load(Z + row[:, None] * stride_z + column, mask=valid, other=0.0).to(tl.float32)
        sums += e * tl.load(R + row[:, None] * stride_r + column, mask=valid, other=0.0)
    tl.store(ERROR + row, tl.sum(sums, axis=1), mask=valid_r)


@triton.jit
def _take_rows_kernel(X, Y, TAKEN, rows, d, stride_x, stride_y, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    taken = tl.load(TAKEN + row, mask=row < rows, other=0).to(tl.int1)
    row = row.to(tl.int64)[:, None]
    for start in range(0, d, BLOCK_D):
        column, valid_d = columns(start, d, 0, 0, BLOCK_D)
        column = column[None, :]
        # Rows that are not taken are neither loaded nor stored.
        moved = taken[:, None] & valid_d[None, :]
        tl.store(X + row * stride_x + column, tl.load(Y + row * stride_y + column, mask=moved), mask=moved)


def row_errors(W: Tensor, R: Tensor, Z: Tensor | None = None) -> Tensor:
    """Compute sum((W - Z) * R) of every row, (rows,) fp32.

    Args:
        W: (rows, d), fp32 / bf16 / fp16. The rows of every matrix are contiguous.
        R: (rows, d) fp32.
        Z: (rows, d), fp32 / bf16 / fp16; None counts as 0.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    rows, d = check_matrix("W", W, FLOATS)
    check_rows((rows, d), W, dict(W=(W, FLOATS), R=(R, (torch.float32,)), Z=(Z, FLOATS)))
    error = torch.empty(rows, dtype=torch.float32, device=W.device)
    if W.numel() == 0:
        return error.zero_()
    config = row_tile(rows, d)
    with on_device(W):
        _row_errors_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            W=W, Z=Z, R=R, ERROR=error, rows=rows, d=d, stride_w=W.stride(0), stride_z=row_stride(Z),
            stride_r=R.stride(0), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return error


def take_rows(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """Set X[taken] = Y[taken] in place.

    Args:
        X, Y: (rows, d), of one dtype: fp32 / bf16 / fp16 / bool. The rows of both are contiguous.
        taken: (rows,) bool.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    rows, d = check_matrix("X", X, (*FLOATS, torch.bool))
    check_rows((rows, d), X, dict(X=(X, (X.dtype,)), Y=(Y, (X.dtype,))))
    check("taken", taken, (rows,), (torch.bool,), X)
    if not taken.is_contiguous():
        raise ValueError(f"taken: expected contiguous entries, got strides {taken.stride()}")
    if X.numel() == 0:
        return
    config = row_tile(rows, d)
    with on_device(X):
        _take_rows_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            X=X, Y=Y, TAKEN=taken, rows=rows, d=d, stride_x=X.stride(0), stride_y=Y.stride(0),
            enable_fp_fusion=True, **config,
        )  # fmt: skip
