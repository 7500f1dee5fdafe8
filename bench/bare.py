"""Rivals of the kernels in plain torch: the product of its library, and `topk`."""

import torch
from torch import Tensor


def bare_product(E: Tensor, G: Tensor, *, precision: str, out: Tensor | None = None) -> Tensor:
    """Multiply E G in fp32, by torch's library (cuBLAS on a GPU) alone.

    Args:
        E, G: (rows, d) and (d, d), in the dtype that tensor cores read at `precision`: bf16, or fp32 for the others.
        precision: as in `product`.
        out: written for fp32 operands. The library allocates the fp32 product of bf16 operands.
    """
    if E.dtype == torch.bfloat16:
        # On a CPU torch has no such product, and rounds the result to bf16.
        return torch.mm(E, G, out_dtype=torch.float32) if E.is_cuda else torch.mm(E, G).float()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        return torch.mm(E, G, out=out)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def topk_lmo(score: Tensor, k: int, *, group: int = 0, out: Tensor | None = None) -> Tensor:
    """Do `lmo` by `torch.topk` and a scatter, except that ties go to any of the equal scores."""
    units = score.reshape(-1, group or score.shape[1])
    V = torch.zeros_like(units, dtype=torch.bool)
    V = V.scatter_(1, units.topk(k, dim=1).indices, True).view(score.shape)
    return V if out is None else out.copy_(V)
