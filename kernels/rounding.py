"""round_mask: choose the binary mask of the highest entries of a relaxed mask M, in three launches.

    first  = lmo(M)
    lowest = the lowest M among the entries of a row (or group) in `first`
    order  = saliency + side,  side = the greatest fp32 value if M > lowest, minus this value if M < lowest, else 0
    mask   = lmo(order)

    M, saliency, order (rows, d) fp32     first, mask (rows, d) bool

    flops = 3 rows d
    bytes = rows d (5 + 13 + 5)      (M in, first out; M, first, saliency in, order out; order in, mask out)

So ties in M go to the higher saliency. The operation is memory-bound. A row is read twice, the second time from the
cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import columns
from .launch import check_matrix, check_rows, on_device, row_tile
from .lmo import lmo


@triton.jit
def _lower(lowest, M, FIRST, row, start, valid_r, d, stride_m, stride_f, BLOCK_D: tl.constexpr):
    """Return the minimum of `lowest` and of the entries of M in one chunk for which FIRST is True."""
    column, valid_d = columns(start, d, 0, 0, BLOCK_D)
    valid = valid_r[:, None] & valid_d[None, :]
    m = tl.load(M + row[:, None] * stride_m + column[None, :], mask=valid, other=0.0)
    first = tl.load(FIRST + row[:, None] * stride_f + column[None, :], mask=valid, other=0).to(tl.int1)
    return tl.minimum(lowest, tl.min(tl.where(first, m, float("inf")), axis=1))


@triton.jit
def _order_kernel(
    M, FIRST, SALIENCY, ORDER, greatest, rows, d, stride_m, stride_f, stride_s, stride_o,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    row = row.to(tl.int64)
    lowest = tl.full((BLOCK_R,), float("inf"), tl.float32)
    for start in range(0, d, BLOCK_D):
        lowest = _lower(lowest, M, FIRST, row, start, valid_r, d, stride_m, stride_f, BLOCK_D)
    for start in range(0, d, BLOCK_D):
        column, valid_d = columns(start, d, 0, 0, BLOCK_D)
        column = column[None, :]
        valid = valid_r[:, None] & valid_d[None, :]
        m = tl.load(M + row[:, None] * stride_m + column, mask=valid, other=0.0)
        s = tl.load(SALIENCY + row[:, None] * stride_s + column, mask=valid, other=0.0)
        side = tl.where(m > lowest[:, None], greatest, tl.where(m < lowest[:, None], -greatest, 0.0))
        tl.store(ORDER + row[:, None] * stride_o + column, side + s, mask=valid)


def rounding_order(M: Tensor, first: Tensor, saliency: Tensor) -> Tensor:
    """Compute `order`, the scores by which M is rounded, (rows, d) fp32; for the formula see the top of this file.

    Args:
        M, saliency: (rows, d) fp32, with contiguous rows.
        first: (rows, d) bool, True for the highest M of every row, with contiguous rows.
    """
    order = torch.empty_like(M)
    config = row_tile(*M.shape)
    with on_device(M):
        _order_kernel[(triton.cdiv(len(M), config["BLOCK_R"]),)](
            M=M, FIRST=first, SALIENCY=saliency, ORDER=order, greatest=torch.finfo(torch.float32).max,
            rows=len(M), d=M.shape[1], stride_m=M.stride(0), stride_f=first.stride(0), stride_s=saliency.stride(0),
            stride_o=order.stride(0), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return order


def round_mask(M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
    """Choose the binary mask of the k highest M of every row (or group), (rows, d) bool; ties go to higher saliency.

    Args:
        M: (rows, d) fp32, the relaxed mask; its rows are contiguous.
        saliency: (rows, d) fp32, at least 0; its rows are contiguous.
        k: number of kept entries of a row, an int or an int tensor (rows,). With `group` it is an int, the number of
            kept entries of a group.
        group: 0 for whole rows, m for n:m; up to 32.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    FP32 = (torch.float32,)
    rows, d = check_matrix("M", M, FP32)
    check_rows((rows, d), M, dict(M=(M, FP32), saliency=(saliency, FP32)))
    first = lmo(M, k, group=group, check_nan=False)
    if M.numel() == 0:
        return first
    # Each group is treated as a row.
    order = rounding_order(*(x.reshape(-1, group or d) for x in (M, first, saliency)))
    return lmo(order.view(rows, d), k, group=group, check_nan=False, out=first)
