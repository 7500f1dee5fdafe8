"""Products of matrices in plain torch, for `--kernel torch`. For formulas see the Triton kernel of the same name."""

import torch
from torch import Tensor

from ..definitions import round_operand

# Number of rows in a panel of a Gram matrix. The lower triangle, computed in panels, has half of the flops of the full
# square, and takes 0.6 to 0.7 of its time.
PANEL = 192

# Number of rows that are mirrored at a time, so that no second G is allocated.
MIRRORED = 512


def product(E: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None, add: bool = False) -> Tensor:
    """Compute E G."""
    if add:
        assert out is not None
        return out.addmm_(round_operand(E, precision), round_operand(G, precision))
    return torch.mm(round_operand(E, precision), round_operand(G, precision), out=out)


def product_transposed(E: Tensor, C: Tensor, *, precision: str = "ieee") -> Tensor:
    """Compute E C^T."""
    return product(E, C.T, precision=precision)


def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add X^T X to the lower triangle of G in place, in panels of rows."""
    X = round_operand(X, precision)
    for start in range(0, len(G), PANEL):
        stop = start + PANEL
        G[start:stop, :stop].addmm_(X[:, start:stop].T, X[:, :stop])
    return G


def mirror_lower(G: Tensor) -> Tensor:
    """Copy the lower triangle of G to the upper one, in place."""
    for start in range(0, len(G), MIRRORED):
        stop = start + MIRRORED
        G[start:stop, stop:] = G[stop:, start:stop].T
        block = G[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).T)
    return G


def cross_accumulate(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add D^T X to B in place."""
    return B.addmm_(round_operand(D, precision).T, round_operand(X, precision))
