"""removed and begin_fit: compute the left operand of a product from weights and a mask. A program works on a few rows.

    removed      E = target_gap + W * (1 - mask)
    begin_fit    Z = mask * start,   E = W - Z

    W, start, E (rows, d)     Z, target_gap (rows, d) fp32     mask (rows, d) bool

    removed      flops = rows d      bytes = rows d (size(W) + 1 + size(E), + 4 with target_gap)
    begin_fit    flops = rows d      bytes = rows d (size(W) + size(start) + 1 + 4 + size(E))

Each is memory-bound. E is stored in the dtype in which the product reads it, and rounded only then.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import cast, columns
from .launch import FLOATS, check_matrix, check_rows, on_device, row_stride, row_tile


@triton.jit
def _removed_kernel(
    W, MASK, TARGET_GAP, E, rows, d, stride_w, stride_m, stride_t, stride_e,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    row = row.to(tl.int64)[:, None]
    for start in range(0, d, BLOCK_D):
        column, valid_d = columns(start, d, 0, 0, BLOCK_D)
        column = column[None, :]
        valid = valid_r[:, None] & valid_d[None, :]
        kept = tl.load(MASK + row * stride_m + column, mask=valid, other=1).to(tl.int1)
        e = tl.where(kept, 0.0, tl.load(W + row * stride_w + column, mask=valid, other=0.0).to(tl.float32))
        if TARGET_GAP is not None:
            e += tl.load(TARGET_GAP + row * stride_t + column, mask=valid, other=0.0)
        tl.store(E + row * stride_e + column, cast(e, E.dtype.element_ty), mask=valid)


@triton.jit
def _begin_fit_kernel(
    W, START, MASK, Z, E, rows, d, stride_w, stride_s, stride_m, stride_z, stride_e,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    row = row.to(tl.int64)[:, None]
    for first in range(0, d, BLOCK_D):
        column, valid_d = columns(first, d, 0, 0, BLOCK_D)
        column = column[None, :]
        valid = valid_r[:, None] & valid_d[None, :]
        kept = tl.load(MASK + row * stride_m + column, mask=valid, other=0).to(tl.int1)
        # Entries outside the mask are not loaded.
        z = tl.load(START + row * stride_s + column, mask=valid & kept, other=0.0).to(tl.float32)
        w = tl.load(W + row * stride_w + column, mask=valid, other=0.0).to(tl.float32)
        tl.store(Z + row * stride_z + column, z, mask=valid)
        tl.store(E + row * stride_e + column, cast(w - z, E.dtype.element_ty), mask=valid)


def removed(W: Tensor, mask: Tensor, target_gap: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Compute the weights that a mask removes, plus the target gap.

    Args:
        W: (rows, d), fp32 / bf16 / fp16. The rows of every matrix are contiguous.
        mask: (rows, d) bool, True keeps a weight.
        target_gap: (rows, d) fp32, target minus W; None counts as 0.
        out: (rows, d), fp32 / bf16 / fp16, written and returned. None: a new matrix, in fp32 with a target gap, in the
            dtype of W without.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    rows, d = check_matrix("W", W, FLOATS)
    if out is None:
        out = torch.empty(rows, d, dtype=W.dtype if target_gap is None else torch.float32, device=W.device)
    matrices = dict(W=(W, FLOATS), mask=(mask, (torch.bool,)), target_gap=(target_gap, (torch.float32,)))
    check_rows((rows, d), W, matrices | dict(out=(out, FLOATS)))
    if W.numel() == 0:
        return out
    config = row_tile(rows, d)
    with on_device(W):
        _removed_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            W=W, MASK=mask, TARGET_GAP=target_gap, E=out, rows=rows, d=d, stride_w=W.stride(0),
            stride_m=mask.stride(0), stride_t=row_stride(target_gap), stride_e=out.stride(0),
            enable_fp_fusion=True, **config,
        )  # fmt: skip
    return out


def begin_fit(W: Tensor, start: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Compute Z = mask * start, and E = W - Z.

    Args:
        W: (rows, d), fp32 / bf16 / fp16. The rows of every matrix are contiguous.
        start: (rows, d), fp32 / bf16 / fp16; entries outside the mask are not read.
        mask: (rows, d) bool, True keeps a weight.
        dtype: dtype of E, fp32 or bf16.

    Returns:
        Z (rows, d) fp32, and E (rows, d).

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    rows, d = check_matrix("W", W, FLOATS)
    check_rows((rows, d), W, dict(W=(W, FLOATS), start=(start, FLOATS), mask=(mask, (torch.bool,))))
    Z = torch.empty(rows, d, dtype=torch.float32, device=W.device)
    E = torch.empty(rows, d, dtype=dtype, device=W.device)
    if W.numel() == 0:
        return Z, E
    config = row_tile(rows, d)
    with on_device(W):
        _begin_fit_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            W=W, START=start, MASK=mask, Z=Z, E=E, rows=rows, d=d, stride_w=W.stride(0), stride_s=start.stride(0),
            stride_m=mask.stride(0), stride_z=Z.stride(0), stride_e=E.stride(0), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return Z, E
