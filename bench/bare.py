"""The obvious ways to do an operation with what torch offers, for the races: its library's product, its `topk`."""

import torch
from torch import Tensor

from sparsefw.kernels import cpu


def bare_product(E: Tensor, G: Tensor, *, precision: str, out: Tensor | None = None) -> Tensor:
    """E G in fp32 by the library behind torch (cuBLAS on a GPU), and nothing else.

    Args:
        E, G: of the type that the tensor cores read at `precision`: bf16, or fp32 for the others.
        precision: as in `cpu.product`.
        out: written where the library can; it has to allocate an fp32 product of bf16 operands.
    """
    if E.dtype == torch.bfloat16:
        # No CPU has this; the product is rounded to bf16 there.
        return torch.mm(E, G, out_dtype=torch.float32) if E.is_cuda else torch.mm(E, G).float()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        return torch.mm(E, G, out=out)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def operands(E: Tensor, G: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Both as `bare_product` wants them."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return E.to(dtype), G.to(dtype)


def topk_lmo(score: Tensor, k: int, *, group: int = 0, out: Tensor | None = None) -> Tensor:
    """`cpu.lmo` by `torch.topk` and a scatter; ties go to any of the equal."""
    units = score.reshape(-1, group or score.shape[1])
    V = torch.zeros_like(units, dtype=torch.bool)
    V = V.scatter_(1, units.topk(k, dim=1).indices, True).view(score.shape)
    return V if out is None else out.copy_(V)


def topk_step(
    W: Tensor,
    diag: Tensor,
    M: Tensor,
    R: Tensor,
    U: Tensor,
    V: Tensor,
    E: Tensor,
    k: int,
    *,
    group: int = 0,
    theta: float = 0.0,
    next_theta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`cpu.row_step` with line search as a chain of torch's operations, `topk` and a scatter among them."""
    W = W.float()
    q, D = W * W * diag, V.float() - M
    lin = (D * (-2 * W * R + theta * q * (1 - 2 * M))).sum(1)
    quad = (W * D * (R - U)).sum(1) - theta * (q * D * D).sum(1)
    eta = torch.where(quad > 0, (-lin / (2 * quad)).clamp(0, 1), (lin + quad < 0).float())
    cpu.convex_update(M, V, R, U, eta)
    score = 2 * W * R - next_theta * q * (1 - 2 * M)
    V.copy_(topk_lmo(score, k, group=group))
    if next_theta < 1:
        V &= score > 0
    E.copy_(W * ~V)
    return eta, (W * (1 - M) * R).sum(1)
