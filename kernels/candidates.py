"""candidates: compute candidate weights after a refit, and the scores by which the mask is chosen again, in one pass.

    candidate = Z at kept weights and outside the support,  Z + R inverse at the other removed weights
    score     = |candidate| root (1 + margin mask)

    Z, R, candidate, score (rows, d) fp32     mask, support (rows, d) bool
    inverse, root (d,) fp32                   margin (rows,) fp32

    flops = 6 rows d
    bytes = rows d (8 + 1 + 8, + 1 with support)      (Z R mask in, candidate score out)

The operation is memory-bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import columns
from .launch import check_matrix, check_rows, check_vector, on_device, row_stride, row_tile


@triton.jit
def _candidates_kernel(
    Z, R, MASK, SUPPORT, INVERSE, ROOT, MARGIN, CANDIDATE, SCORE, rows, d,
    stride_z, stride_r, stride_m, stride_s, stride_c, stride_score,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    margin = tl.zeros((BLOCK_R,), tl.float32)
    if MARGIN is not None:
        margin = tl.load(MARGIN + row, mask=valid_r, other=0.0)
    row = row.to(tl.int64)[:, None]
    for start in range(0, d, BLOCK_D):
        column, valid_d = columns(start, d, 0, 0, BLOCK_D)
        valid = valid_r[:, None] & valid_d[None, :]
        inverse = tl.load(INVERSE + column, mask=valid_d, other=0.0)[None, :]
        root = tl.load(ROOT + column, mask=valid_d, other=0.0)[None, :]
        column = column[None, :]
        z = tl.load(Z + row * stride_z + column, mask=valid, other=0.0)
        r = tl.load(R + row * stride_r + column, mask=valid, other=0.0)
        kept = tl.load(MASK + row * stride_m + column, mask=valid, other=0).to(tl.int1)
        unchanged = kept
        if SUPPORT is not None:
            unchanged = unchanged | (tl.load(SUPPORT + row * stride_s + column, mask=valid, other=0) == 0)
        candidate = tl.where(unchanged, z, z + r * inverse)
        tl.store(CANDIDATE + row * stride_c + column, candidate, mask=valid)
        score = tl.abs(candidate) * root
        tl.store(SCORE + row * stride_score + column, tl.where(kept, score * (1 + margin[:, None]), score), mask=valid)


def candidates(
    Z: Tensor,
    R: Tensor,
    mask: Tensor,
    inverse: Tensor,
    root: Tensor,
    *,
    margin: Tensor | None = None,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the candidates and their scores.

    Args:
        Z: (rows, d) fp32, refitted weights, 0 outside the mask. The rows of every matrix are contiguous.
        R: (rows, d) fp32, (W - Z) G.
        mask: (rows, d) bool, True keeps a weight.
        inverse: (d,) fp32, contiguous, 1 / diag(G).
        root: (d,) fp32, contiguous, the square roots of diag(G).
        margin: (rows,) fp32, contiguous: share by which the score of a removed weight must exceed the score of a kept
            weight to replace it; None counts as 0.
        support: (rows, d) bool, True where a weight may be nonzero; None: everywhere.

    Returns:
        Candidates and scores, (rows, d) fp32 each.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    FP32, BOOL = (torch.float32,), (torch.bool,)
    rows, d = check_matrix("Z", Z, FP32)
    check_rows((rows, d), Z, dict(Z=(Z, FP32), R=(R, FP32), mask=(mask, BOOL), support=(support, BOOL)))
    check_vector("inverse", inverse, d, Z)
    check_vector("root", root, d, Z)
    if margin is not None:
        check_vector("margin", margin, rows, Z)
    # Two allocations, since the caller frees the score long before the candidates.
    candidate, score = (torch.empty(rows, d, dtype=torch.float32, device=Z.device) for _ in range(2))
    if Z.numel() == 0:
        return candidate, score
    config = row_tile(rows, d)
    with on_device(Z):
        _candidates_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            Z=Z, R=R, MASK=mask, SUPPORT=support, INVERSE=inverse, ROOT=root, MARGIN=margin, CANDIDATE=candidate,
            SCORE=score, rows=rows, d=d, stride_z=Z.stride(0), stride_r=R.stride(0), stride_m=mask.stride(0),
            stride_s=row_stride(support), stride_c=candidate.stride(0), stride_score=score.stride(0),
            enable_fp_fusion=True, **config,
        )  # fmt: skip
    return candidate, score
