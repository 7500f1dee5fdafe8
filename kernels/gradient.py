"""gradient: -2 W * ((W * (1 - M)) G), the gradient of the pruning error with respect to the mask, in one pass.

    W (rows, d) fp32 / bf16 / fp16     M (rows, d) fp32     G (d, d) symmetric, fp32 or bf16     out (rows, d) fp32

    flops = 2 rows d^2 + 4 rows d
    bytes = 2 rows d size(W) + 4 rows d + d^2 size(G) + 4 rows d

W * (1 - M) is computed in fp32 as its tile is loaded, and never stored. It is rounded to `precision` like any operand
of the product. Accumulation, order of tiles and precisions are those of product.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FLOATS, check, check_matrix, on_device
from .product import configuration, dot_options, product_tile


@triton.jit
def _gradient_kernel(
    W, M, G, OUT, rows, d, stride_wr, stride_wd, stride_mr, stride_md, stride_gr, stride_gd, stride_or, stride_od,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    acc, offs_m, offs_n = product_tile(
        W, M, G, rows, d, stride_wr, stride_wd, stride_mr, stride_md, stride_gr, stride_gd,
        DTYPE, PRECISION, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    valid = (offs_m < rows)[:, None] & (offs_n < d)[None, :]
    row = offs_m.to(tl.int64)[:, None]
    column = offs_n.to(tl.int64)[None, :]
    w = tl.load(W + row * stride_wr + column * stride_wd, mask=valid, other=0.0).to(tl.float32)
    tl.store(OUT + row * stride_or + column * stride_od, -2 * w * acc, mask=valid)


def _launch(W: Tensor, M: Tensor, G: Tensor, out: Tensor, options: dict[str, object]) -> None:
    """Launch the gradient of a matrix that is not empty on the current device."""
    rows, d = out.shape
    split = options["PRECISION"] == "tf32x3"
    low = options["DTYPE"] == tl.bfloat16
    stored = W.element_size() + M.element_size(), G.element_size()
    config = configuration(rows, d, 2 if low else 4, wide=False, stored=stored, split=split)
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(d, config["BLOCK_N"]),)
    _gradient_kernel[grid](
        W=W, M=M, G=G, OUT=out, rows=rows, d=d,
        stride_wr=W.stride(0), stride_wd=W.stride(1), stride_mr=M.stride(0), stride_md=M.stride(1),
        stride_gr=G.stride(0), stride_gd=G.stride(1), stride_or=out.stride(0), stride_od=out.stride(1),
        enable_fp_fusion=True, **options, **config,
    )  # fmt: skip


def gradient(W: Tensor, M: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None) -> Tensor:
    """Gradient of error(M) with respect to M: `naive.gradient` up to rounding.

    Args:
        W: (rows, d), fp32 / bf16 / fp16, any strides.
        M: (rows, d), fp32 in [0, 1].
        G: (d, d), symmetric, fp32 or bf16.
        precision: rounding of both operands of the product, one of PRECISIONS.
        out: (rows, d) fp32, written and returned; allocated when None.

    Raises:
        ValueError, TypeError: for arguments that do not fit this description.
    """
    rows, d = check_matrix("W", W, FLOATS)
    check("M", M, (rows, d), (torch.float32,), W)
    check("G", G, (d, d), (torch.float32, torch.bfloat16), W)
    if out is None:
        out = torch.empty(rows, d, dtype=torch.float32, device=W.device)
    check("out", out, (rows, d), (torch.float32,), W)
    # The device's platform decides what is launched.
    with on_device(W):
        options = dot_options((M.dtype, G.dtype), precision)
        if out.numel():
            _launch(W, M, G, out, options)
    return out
