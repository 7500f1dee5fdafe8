"""cross_accumulate: add D^T X to B in place.

    D (tokens, rows), X (tokens, d) fp32 / bf16 / fp16, of the same dtype     B (rows, d) fp32

One program adds to an entry of B, once, so every run gives the same bits. Products of bf16 and fp16 inputs are exact;
fp32 inputs are rounded to `precision`. Sums are accumulated in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .accumulate import accumulate, suits
from .accumulate import cost as cost_of_sum
from .definitions import round_operand
from .device import dot, grouped_tile
from .launch import FLOATS, check, check_fp32_precision, check_matrix, on_device, platform, vectorized
from .operation import BULK, NVIDIA, Arguments, Cost, Size, launch, metadata, operation
from .product import TRITON_DTYPES, library


def reference(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Compute the operation in plain torch."""
    return B.add_(round_operand(D, precision).T @ round_operand(X, precision))


def cost(B: Tensor, X: Tensor, precision: str = "ieee") -> Cost:
    """Read D and X, and read and write B. D is not named, since a kernel has another argument d."""
    return cost_of_sum(B, X, precision)


def example(size: Size, *, precision: str = "ieee") -> Arguments:
    """Make inputs, and the sum of earlier ones."""
    D, X = (size.normal(size.tokens, n, dtype=size.dtype, seed=n) for n in (size.rows, size.d))
    return dict(B=size.matrix(), D=D, X=X, precision=precision)


def configuration(rows: int, d: int, size: int, vectors: bool) -> dict[str, int]:
    """Choose tile sizes and launch options for inputs of `size` bytes; for `vectors` see `launch.vectorized`."""
    target = platform()
    if target == "interpreter":
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8)
    BLOCK_K, stages = 128 // size, dict(hip=2, sm_80=3, sm_90=4)[target]
    if triton.cdiv(rows, 128) * triton.cdiv(d, 128) < 128 or not vectors:
        # Large tiles are too few to fill a GPU, or they would spill, since each entry is loaded by an instruction of
        # its own. In that case small tiles spill on sm_80 as well, unless 8 warps share the addresses.
        num_warps = 4 if vectors else 8
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=BLOCK_K, GROUP_M=8, num_warps=num_warps, num_stages=stages)
    if target == "sm_80" and size == 4:
        # Steps of 128 bytes need 245 registers on sm_80, and spill on sm_120. Steps of half the size need 158 and 150.
        BLOCK_K, stages = BLOCK_K // 2, stages + 1
    # Larger tiles spill in the epilogue, where registers hold a tile of B and the sums.
    if target == "hip":
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=BLOCK_K // 2, GROUP_M=8, num_warps=4, num_stages=stages)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=BLOCK_K, GROUP_M=8, num_warps=8, num_stages=stages)


@triton.jit(launch_metadata=metadata(cost))
def _cross_kernel(
    B, D, X, tokens, rows, d, stride_br, stride_bd, stride_dt, stride_dr, stride_xt, stride_xd,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_m, first_n = grouped_tile(tl.program_id(0), rows, d, GROUP_M, BLOCK_M, BLOCK_N)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    # Indices past the edge are masked, and not clamped as in product.py, since these loads are contiguous along them.
    valid_m = offs_m < rows
    valid_n = offs_n < d
    token = offs_k.to(tl.int64)
    # A tile of D^T is loaded directly. If it were transposed after the load, sm_80 would not load 16-bit tiles ahead.
    d_ptrs = D + token[None, :] * stride_dt + offs_m.to(tl.int64)[:, None] * stride_dr
    x_ptrs = X + token[:, None] * stride_xt + offs_n.to(tl.int64)[None, :] * stride_xd
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tokens, BLOCK_K):
        valid_k = offs_k < tokens - start
        a = tl.load(d_ptrs, mask=valid_m[:, None] & valid_k[None, :], other=0.0)
        b = tl.load(x_ptrs, mask=valid_k[:, None] & valid_n[None, :], other=0.0)
        acc = dot(a, b, acc, DTYPE, PRECISION)
        d_ptrs += BLOCK_K * stride_dt
        x_ptrs += BLOCK_K * stride_xt

    valid = valid_m[:, None] & valid_n[None, :]
    b_ptrs = B + offs_m.to(tl.int64)[:, None] * stride_br + offs_n.to(tl.int64)[None, :] * stride_bd
    tl.store(b_ptrs, tl.load(b_ptrs, mask=valid, other=0.0) + acc, mask=valid)


@operation(
    reference, cost, example, writes=("B",), tolerance=None,
    library=lambda B, D, X, precision: library(D, X, precision=precision, out=B, transposed=True),
    launches=(
        # Rows are not aligned for bulk copies.
        launch(BULK, 4100, 4100),
        launch(NVIDIA, dtype=torch.float32, precision="tf32"),
        launch(NVIDIA, 576, 576, dtype=torch.float32),
    ),
)  # fmt: skip
def cross_accumulate(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add D^T X to B in place.

    Args:
        B: (rows, d) fp32, any strides.
        D: (tokens, rows), dtype of X, any strides.
        X: (tokens, d), fp32 / bf16 / fp16, any strides.
        precision: rounding of fp32 inputs, "ieee" or "tf32".

    Returns:
        B.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    tokens, d = check_matrix("X", X, FLOATS)
    rows = check_matrix("D", D, (X.dtype,))[1]
    check("D", D, (tokens, rows), (X.dtype,), X)
    check("B", B, (rows, d), (torch.float32,), X)
    check_fp32_precision(precision)
    if X.numel() == 0 or D.numel() == 0:
        return B
    with on_device(X):
        if suits(B, D, X, triangle=False):
            accumulate(B, D, X, triangle=False)
            return B
        config = configuration(rows, d, X.element_size(), vectorized(D) and vectorized(X))
        grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(d, config["BLOCK_N"]),)
        _cross_kernel[grid](
            B, D, X, tokens, rows, d, *B.stride(), *D.stride(), *X.stride(),
            DTYPE=TRITON_DTYPES[X.dtype], PRECISION=precision, enable_fp_fusion=True, **config,
        )  # fmt: skip
    return B
