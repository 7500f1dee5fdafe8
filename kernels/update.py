"""convex_update: M += eta (V - M) and R += eta (U - R) in place, one step size per row.

M, R, U (rows, d) fp32     V (rows, d) bool     eta (rows,) fp32

flops = 6 rows d
bytes = rows d (4 + 4 + 4 + 1 + 4 + 4)      (read M, R, U, V; write M, R)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import columns, move
from .launch import check, check_matrix, interpreter_tile, on_device, platform, warps


def configuration(rows: int, d: int) -> dict[str, int]:
    """Tile sizes and launch options for one memory-bound pass, with enough bytes in flight per program."""
    if platform() == "interpreter":
        return interpreter_tile(rows, d)
    BLOCK_D = min(triton.next_power_of_2(d), 1024)
    return dict(BLOCK_R=1024 // BLOCK_D, BLOCK_D=BLOCK_D, num_warps=warps(4))


@triton.jit
def _update_kernel(
    M, V, R, U, ETA, rows, d,
    stride_mr, stride_md, stride_vr, stride_vd, stride_rr, stride_rd, stride_ur, stride_ud, stride_eta,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles_d = tl.cdiv(d, BLOCK_D)
    offs_r = tl.program_id(0) // tiles_d * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d, valid_d = columns(tl.program_id(0) % tiles_d * BLOCK_D, d, 0, 0, BLOCK_D)
    valid_r = offs_r < rows
    valid = valid_r[:, None] & valid_d[None, :]
    offs_r = offs_r.to(tl.int64)
    row = offs_r[:, None]
    column = offs_d.to(tl.int64)[None, :]
    eta = tl.load(ETA + offs_r * stride_eta, mask=valid_r, other=0.0)[:, None]
    m_ptrs = M + row * stride_mr + column * stride_md
    r_ptrs = R + row * stride_rr + column * stride_rd
    m = tl.load(m_ptrs, mask=valid, other=0.0)
    r = tl.load(r_ptrs, mask=valid, other=0.0)
    v = tl.load(V + row * stride_vr + column * stride_vd, mask=valid, other=0).to(tl.float32)
    u = tl.load(U + row * stride_ur + column * stride_ud, mask=valid, other=0.0)
    tl.store(m_ptrs, move(m, v, eta), mask=valid)
    tl.store(r_ptrs, move(r, u, eta), mask=valid)


def convex_update(M: Tensor, V: Tensor, R: Tensor, U: Tensor, eta: Tensor) -> None:
    """M += eta (V - M) and R += eta (U - R), in place: `naive.convex_update` up to rounding.

    Args:
        M, R, U: (rows, d) fp32, any strides.
        V: (rows, d) bool.
        eta: (rows,) fp32 in [0, 1].

    Raises:
        ValueError, TypeError: for arguments that do not fit this description.
    """
    rows, d = check_matrix("M", M, (torch.float32,))
    check("V", V, (rows, d), (torch.bool,), M)
    check("R", R, (rows, d), (torch.float32,), M)
    check("U", U, (rows, d), (torch.float32,), M)
    check("eta", eta, (rows,), (torch.float32,), M)
    if M.numel() == 0:
        return
    config = configuration(rows, d)
    with on_device(M):
        _update_kernel[(triton.cdiv(rows, config["BLOCK_R"]) * triton.cdiv(d, config["BLOCK_D"]),)](
            M=M, V=V, R=R, U=U, ETA=eta, rows=rows, d=d,
            stride_mr=M.stride(0), stride_md=M.stride(1), stride_vr=V.stride(0), stride_vd=V.stride(1),
            stride_rr=R.stride(0), stride_rd=R.stride(1), stride_ur=U.stride(0), stride_ud=U.stride(1),
            stride_eta=eta.stride(0), enable_fp_fusion=True, **config,
        )  # fmt: skip
