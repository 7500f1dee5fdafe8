"""Saliencies: how much a weight matters by itself. They choose the warm start and the fixed entries, and break ties."""

import torch
from torch import Tensor

RIA_POWER = 0.5


def magnitude(W: Tensor, diag: Tensor) -> Tensor:
    """|W|."""
    return W.float().abs()


def wanda(W: Tensor, diag: Tensor) -> Tensor:
    """|W_ij| ||X_j||_2 (Sun et al., arXiv 2306.11695)."""
    return W.float().abs() * diag.sqrt()


def ria(W: Tensor, diag: Tensor) -> Tensor:
    """|W_ij| (1 / sum_k |W_ik| + 1 / sum_k |W_kj|) ||X_j||_2^0.5 (Zhang et al., ICLR 2024).

    The entries of a row or column of zeros are 0.
    """
    A = W.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    relative = A / A.sum(1, keepdim=True).clamp(min=tiny) + A / A.sum(0, keepdim=True).clamp(min=tiny)
    return relative * diag.sqrt().pow(RIA_POWER)


# Each takes W (rows, d) and diag (d,), the diagonal of the Gram matrix, and gives (rows, d) fp32, at least 0.
SALIENCIES = {"magnitude": magnitude, "wanda": wanda, "ria": ria}

# Those of which an entry depends on more of the matrix than its row.
OF_MATRIX = frozenset({"ria"})
