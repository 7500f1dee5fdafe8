"""gram_accumulate: G += X^T X in place, one triangle of tiles computed, both triangles written.

    X (tokens, d) fp32 / bf16 / fp16     G (d, d) fp32, symmetric

    flops = tokens d (d + 1)                               (half of the full square)
    bytes = tokens d size(X) + 4 d (d + 1) / 2 + 4 d^2     (X once; one triangle of G read, both written)

Every entry of the lower triangle is computed once and stored twice, also in the tiles on the diagonal, so G is exactly
symmetric. Each entry belongs to one program: there are no atomics, and every run gives the same bits. Products of bf16
and fp16 inputs are exact; fp32 inputs are rounded to `precision`. Sums are accumulated in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import dot
from .launch import FLOATS, check, check_fp32_precision, check_matrix, on_device, platform
from .product import DTYPES


def configuration(d: int, size: int) -> dict[str, int]:
    """Tile sizes and launch options for (d, d) and inputs of `size` bytes."""
    where = platform()
    if where == "interpreter":
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, SIDE=256)
    BLOCK_K = 128 // size
    if d <= 1024:
        return dict(
            BLOCK_M=64, BLOCK_N=64, BLOCK_K=BLOCK_K, SIDE=512, num_warps=4, num_stages=2 if where == "hip" else 4
        )
    if where == "hip":
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=BLOCK_K // 2, SIDE=1024, num_warps=4, num_stages=2)
    # Larger tiles spill in the epilogue, where a tile of G lies beside the sums.
    if where == "sm_90":
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=BLOCK_K, SIDE=1024, num_warps=8, num_stages=4)
    return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=BLOCK_K, SIDE=1024, num_warps=8, num_stages=3)


@triton.jit
def _gram_kernel(
    G, X, tokens, d, stride_gr, stride_gd, stride_xt, stride_xd,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs walk the triangle in squares of SIDE x SIDE entries, so that those that run together share columns of X
    # in the cache. Square s of the triangle lies in row i, where i (i + 1) / 2 <= s < (i + 1) (i + 2) / 2.
    PER_SQUARE: tl.constexpr = (SIDE // BLOCK_M) * (SIDE // BLOCK_N)
    s = tl.program_id(0) // PER_SQUARE
    within = tl.program_id(0) % PER_SQUARE
    i = ((tl.sqrt(8.0 * s + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded, so i may be off by one.
    i = i + (s >= (i + 1) * (i + 2) // 2).to(tl.int32) - (s < i * (i + 1) // 2).to(tl.int32)
    j = s - i * (i + 1) // 2
    first_m = i * SIDE + within % (SIDE // BLOCK_M) * BLOCK_M
    first_n = j * SIDE + within // (SIDE // BLOCK_M) * BLOCK_N
    if (first_m < d) & (first_n < d) & (first_m + BLOCK_M > first_n):
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        # Masked, not clamped as in product.py: these columns are the contiguous axis of the loads.
        valid_m = offs_m < d
        valid_n = offs_n < d
        token = offs_k.to(tl.int64)[:, None]
        a_ptrs = X + token * stride_xt + offs_m.to(tl.int64)[None, :] * stride_xd
        b_ptrs = X + token * stride_xt + offs_n.to(tl.int64)[None, :] * stride_xd
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, tokens, BLOCK_K):
            valid_k = offs_k < tokens - start
            a = tl.load(a_ptrs, mask=valid_k[:, None] & valid_m[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=valid_k[:, None] & valid_n[None, :], other=0.0)
            acc = dot(tl.trans(a), b, acc, DTYPE, PRECISION)
            a_ptrs += BLOCK_K * stride_xt
            b_ptrs += BLOCK_K * stride_xt

        row = offs_m.to(tl.int64)[:, None]
        column = offs_n.to(tl.int64)[None, :]
        # In a tile on the diagonal this keeps one of each mirrored pair. In other tiles it is always true.
        valid = valid_m[:, None] & valid_n[None, :] & (row >= column)
        g_ptrs = G + row * stride_gr + column * stride_gd
        g = tl.load(g_ptrs, mask=valid, other=0.0) + acc
        tl.store(g_ptrs, g, mask=valid)
        mirror = G + tl.trans(column) * stride_gr + tl.trans(row) * stride_gd
        tl.store(mirror, tl.trans(g), mask=tl.trans(valid))


def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """G += X^T X in place: `naive.gram_accumulate` up to rounding.

    Args:
        G: (d, d) fp32, symmetric, any strides. Its lower triangle is read, all of it is written.
        X: (tokens, d), fp32 / bf16 / fp16, any strides.
        precision: rounding of fp32 inputs, "ieee" or "tf32".

    Returns:
        G.

    Raises:
        ValueError, TypeError: for arguments that do not fit this description.
    """
    tokens, d = check_matrix("X", X, FLOATS)
    check("G", G, (d, d), (torch.float32,), X)
    check_fp32_precision(precision)
    if X.numel() == 0:
        return G
    config = configuration(d, X.element_size())
    side = triton.cdiv(d, config["SIDE"])
    squares = side * (side + 1) // 2
    per_square = (config["SIDE"] // config["BLOCK_M"]) * (config["SIDE"] // config["BLOCK_N"])
    with on_device(X):
        _gram_kernel[(squares * per_square,)](
            G=G, X=X, tokens=tokens, d=d,
            stride_gr=G.stride(0), stride_gd=G.stride(1), stride_xt=X.stride(0), stride_xd=X.stride(1),
            DTYPE=DTYPES[X.dtype], PRECISION=precision, enable_fp_fusion=True, **config,
        )  # fmt: skip
    return G
