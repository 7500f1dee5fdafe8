"""gram_accumulate: add X^T X to the lower triangle of a Gram matrix (the Hessian of SparseGPT and GPTQ), in place.

    X (tokens, d) fp32 / bf16 / fp16     G (d, d) fp32

Entries above the diagonal are undefined until `mirror_lower` overwrites them, after the last of many calls. A copy of
the triangle in each call would double the bytes of G.

One program adds to an entry of G, once, so every run gives the same bits. Products of bf16 and fp16 inputs are exact;
fp32 inputs are rounded to `precision`. Sums are accumulated in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .accumulate import accumulate, suits
from .accumulate import cost as cost_of_sum
from .definitions import round_operand
from .device import dot, triangle_tile
from .launch import FLOATS, check, check_fp32_precision, check_matrix, on_device, platform, triangle_tiles, vectorized
from .operation import BULK, NVIDIA, Arguments, Cost, Size, launch, metadata, operation
from .product import TRITON_DTYPES, library


def reference(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Compute the operation in plain torch, and the upper triangle of the product as well."""
    X = round_operand(X, precision)
    return G.add_(X.T @ X)


def cost(G: Tensor, X: Tensor, precision: str = "ieee") -> Cost:
    """Compute half of the full square: read X, and read and write a triangle of G."""
    return cost_of_sum(G, X, precision, triangle=True)


def example(size: Size, *, precision: str = "ieee") -> Arguments:
    """Make inputs, and the sum of earlier ones."""
    return dict(G=size.gram(), X=size.normal(size.tokens, size.d, dtype=size.dtype), precision=precision)


def configuration(d: int, size: int, vectors: bool) -> dict[str, int]:
    """Choose tile sizes and launch options for inputs of `size` bytes; for `vectors` see `launch.vectorized`."""
    target = platform()
    if target == "interpreter":
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8)
    BLOCK_K = 128 // size
    # Large tiles spill if each entry is loaded by an instruction of its own. In that case steps of 128 bytes spill on
    # sm_89 if entries have 4 bytes.
    if d <= 1024 or not vectors:
        BLOCK_K = BLOCK_K if vectors or size == 2 else BLOCK_K // 2
        stages = 2 if target == "hip" else 4
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=BLOCK_K, GROUP_M=8, num_warps=4, num_stages=stages)
    if target == "hip":
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=BLOCK_K // 2, GROUP_M=8, num_warps=4, num_stages=2)
    # Larger tiles spill in the epilogue, where registers hold a tile of G and the sums.
    if target == "sm_90":
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=BLOCK_K, GROUP_M=8, num_warps=8, num_stages=4)
    return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=BLOCK_K, GROUP_M=8, num_warps=8, num_stages=3)


@triton.jit(launch_metadata=metadata(cost))
def _gram_kernel(
    G, X, tokens, d, stride_gr, stride_gd, stride_xt, stride_xd,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_m, first_n = triangle_tile(tl.program_id(0), d, GROUP_M, BLOCK_M, BLOCK_N)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Indices past the edge are masked, and not clamped as in product.py, since these loads are contiguous along them.
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
    # Entries above the diagonal, which only tiles on the diagonal have, are not stored.
    valid = valid_m[:, None] & valid_n[None, :] & (row >= column)
    g_ptrs = G + row * stride_gr + column * stride_gd
    tl.store(g_ptrs, tl.load(g_ptrs, mask=valid, other=0.0) + acc, mask=valid)


@operation(
    reference, cost, example, writes=("G",), result=lambda _, G: (G.tril(),), tolerance=None,
    library=lambda G, X, precision: library(X, X, precision=precision, out=G, transposed=True),
    launches=(
        launch(BULK, d=14336, dtype=torch.float16),
        # Rows are not aligned for bulk copies.
        launch(BULK, d=4100),
        launch(NVIDIA, dtype=torch.float32, precision="tf32"),
    ),
)  # fmt: skip
def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add X^T X to the lower triangle of G in place.

    Args:
        G: (d, d) fp32, any strides. Entries above its diagonal become undefined.
        X: (tokens, d), fp32 / bf16 / fp16, any strides.
        precision: rounding of fp32 inputs, "ieee" or "tf32".

    Returns:
        G.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    tokens, d = check_matrix("X", X, FLOATS)
    check("G", G, (d, d), (torch.float32,), X)
    check_fp32_precision(precision)
    if X.numel() == 0:
        return G
    with on_device(X):
        if suits(G, X, X, triangle=True):
            accumulate(G, X, X, triangle=True)
            return G
        config = configuration(d, X.element_size(), vectorized(X))
        _gram_kernel[(triangle_tiles(d, config["BLOCK_M"], config["BLOCK_N"]),)](
            G, X, tokens, d, *G.stride(), *X.stride(),
            DTYPE=TRITON_DTYPES[X.dtype], PRECISION=precision, enable_fp_fusion=True, **config,
        )  # fmt: skip
    return G
