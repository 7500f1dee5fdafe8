"""Products of matrices in plain torch, for `--kernel torch`. For formulas see the Triton kernel of the same name."""

import torch
from torch import Tensor

from ..definitions import round_operand

# Number of rows in a panel of a Gram matrix. The lower triangle, computed in panels, has half of the flops of the full
# square, and takes 0.6 to 0.7 of its time.
PANEL = 192

# Number of rows and columns of a tile that is mirrored. Two tiles stay in a core's cache.
TILE = 128


def product(E: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None, add: bool = False) -> Tensor:
    """Compute E G."""
    E, G = round_operand(E, precision), round_operand(G, precision)
    if add:
        assert out is not None
        return out.addmm_(E, G)
    return torch.mm(E, G, out=out)


def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add X^T X to the lower triangle of G in place, in panels of rows."""
    X = round_operand(X, precision)
    for start in range(0, len(G), PANEL):
        stop = start + PANEL
        G[start:stop, :stop].addmm_(X[:, start:stop].T, X[:, :stop])
    return G


def mirror_lower(G: Tensor) -> Tensor:
    """Copy the lower triangle of G to the upper one, in place, in tiles."""
    # torch transposes fast only from a contiguous tile to a contiguous tile.
    turned = G.new_empty(TILE, TILE)
    for i in range(0, len(G), TILE):
        rows = slice(i, i + TILE)
        for j in range(0, i, TILE):
            columns = slice(j, j + TILE)
            tile = G[rows, columns].contiguous().T
            G[columns, rows] = turned.copy_(tile) if tile.shape == turned.shape else tile
        block = G[rows, rows]
        block.copy_(block.tril() + block.tril(-1).T)
    return G


def cross_accumulate(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add D^T X to B in place."""
    return B.addmm_(round_operand(D, precision).T, round_operand(X, precision))
