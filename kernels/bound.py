"""bound_scores and bound_sums: compute the terms of the lower bound of the error.

`bound_scores` computes the scores by which `lmo` chooses the bound's vertex V. Then `bound_sums` sums over V.

    r        = R - (target_gap + W * (1 - M)) damping
    score    = W r
    constant = sum(target_gap * r)
    sums     = sum(score * (1 + M - 2 V))

    W (rows, d) floating     R, M, target_gap, score (rows, d) fp32     V (rows, d) bool     damping (d,) fp32

    bound_scores    flops = 7 rows d    bytes = rows d (size(W) + 4 + 4, + 4 for M with damping, + 4 with target_gap)
    bound_sums      flops = 5 rows d    bytes = rows d (4 + 4 + 1)

Each is one pass, and memory-bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import columns
from .launch import FLOATS, check_matrix, check_rows, check_vector, on_device, row_stride, row_tile


@triton.jit
def _bound_scores_kernel(
    W, R, M, TARGET_GAP, DAMPING, SCORE, CONSTANT, rows, d, stride_w, stride_r, stride_m, stride_t, stride_s,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    row = row.to(tl.int64)
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        column, valid_d = columns(start, d, 0, 0, BLOCK_D)
        valid = valid_r[:, None] & valid_d[None, :]
        w = tl.load(W + row[:, None] * stride_w + column[None, :], mask=valid, other=0.0).to(tl.float32)
        r = tl.load(R + row[:, None] * stride_r + column[None, :], mask=valid, other=0.0)
        if TARGET_GAP is not None:
            gap = tl.load(TARGET_GAP + row[:, None] * stride_t + column[None, :], mask=valid, other=0.0)
        if DAMPING is not None:
            e = w * (1 - tl.load(M + row[:, None] * stride_m + column[None, :], mask=valid, other=0.0))
            if TARGET_GAP is not None:
                e += gap
            r -= e * tl.load(DAMPING + column, mask=valid_d, other=0.0)[None, :]
        if TARGET_GAP is not None:
            sums += gap * r
        tl.store(SCORE + row[:, None] * stride_s + column[None, :], w * r, mask=valid)
    tl.store(CONSTANT + row, tl.sum(sums, axis=1), mask=valid_r)


@triton.jit
def _bound_sums_kernel(
    SCORE, M, V, SUM, rows, d, stride_s, stride_m, stride_v, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    row = row.to(tl.int64)
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        column, valid_d = columns(start, d, 0, 0, BLOCK_D)
        column = column[None, :]
        valid = valid_r[:, None] & valid_d[None, :]
        score = tl.load(SCORE + row[:, None] * stride_s + column, mask=valid, other=0.0)
        m = tl.load(M + row[:, None] * stride_m + column, mask=valid, other=0.0)
        v = tl.load(V + row[:, None] * stride_v + column, mask=valid, other=0).to(tl.float32)
        sums += score * (1 + m - 2 * v)
    tl.store(SUM + row, tl.sum(sums, axis=1), mask=valid_r)


def bound_scores(
    W: Tensor, R: Tensor, M: Tensor, *, target_gap: Tensor | None = None, damping: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the scores by which the bound's vertex is chosen, and the constant term of the bound.

    Args:
        W: (rows, d), fp32 / bf16 / fp16. The rows of every matrix are contiguous.
        R: (rows, d) fp32, (target_gap + W * (1 - M)) (G + damping).
        M: (rows, d) fp32, the relaxed mask.
        target_gap: (rows, d) fp32, target minus W; None if the target is W.
        damping: (d,) fp32, contiguous: values added to the diagonal of G; None counts as 0.

    Returns:
        score (rows, d) fp32, and constant (rows,) fp32.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    rows, d = check_matrix("W", W, FLOATS)
    FP32 = (torch.float32,)
    check_rows((rows, d), W, dict(W=(W, FLOATS), R=(R, FP32), M=(M, FP32), target_gap=(target_gap, FP32)))
    if damping is not None:
        check_vector("damping", damping, d, W)
    score = torch.empty(rows, d, dtype=torch.float32, device=W.device)
    constant = torch.empty(rows, dtype=torch.float32, device=W.device)
    if W.numel() == 0:
        return score, constant.zero_()
    config = row_tile(rows, d)
    with on_device(W):
        _bound_scores_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            W=W, R=R, M=M, TARGET_GAP=target_gap, DAMPING=damping, SCORE=score, CONSTANT=constant, rows=rows, d=d,
            stride_w=W.stride(0), stride_r=R.stride(0), stride_m=M.stride(0), stride_t=row_stride(target_gap),
            stride_s=score.stride(0), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return score, constant


def bound_sums(score: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """Compute sum(score * (1 + M - 2 V)) of every row, (rows,) fp32.

    Args:
        score: (rows, d) fp32, from `bound_scores`. The rows of every matrix are contiguous.
        M: (rows, d) fp32, the relaxed mask.
        V: (rows, d) bool, the vertex that `lmo` chose by `score`.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    FP32 = (torch.float32,)
    rows, d = check_matrix("score", score, FP32)
    check_rows((rows, d), score, dict(score=(score, FP32), M=(M, FP32), V=(V, (torch.bool,))))
    sums = torch.empty(rows, dtype=torch.float32, device=score.device)
    if score.numel() == 0:
        return sums.zero_()
    config = row_tile(rows, d)
    with on_device(score):
        _bound_sums_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            SCORE=score, M=M, V=V, SUM=sums, rows=rows, d=d, stride_s=score.stride(0), stride_m=M.stride(0),
            stride_v=V.stride(0), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return sums
