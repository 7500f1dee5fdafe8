"""Refit: the kept weights of a mask make up for the removed ones, by conjugate gradients on the same Gram matrix.

    minimise ||(W - Z) X||_F^2 = sum((W - Z) * ((W - Z) G)) over Z, zero outside the mask

Rows are independent least-squares problems. A step costs one product; the preconditioner is the diagonal of G. Callers
damp G, see `objective.damped`: damping draws Z towards W, and stops weights whose inputs are nearly the same from
growing with opposite signs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend


@dataclass
class Fit:
    """Weights under a mask, and their error.

    Attributes:
        mask: (rows, d) bool, True keeps a weight.
        Z: (rows, d) fp32, 0 outside the mask.
        R: (rows, d) fp32, (W - Z) G.
        error: (rows,) fp32, sum((W - Z) * R) per row.
    """

    mask: Tensor
    Z: Tensor
    R: Tensor
    error: Tensor

    def take_better(self, other: "Fit", backend: Backend = TORCH) -> Tensor:
        """Replace the rows in which the other's error is lower, in place; returns them, (rows,) bool."""
        better = other.error < self.error
        for mine, theirs in ((self.mask, other.mask), (self.Z, other.Z), (self.R, other.R)):
            backend.take_rows(mine, theirs, better)
        self.error = torch.where(better, other.error, self.error)
        return better


def inverse_diagonal(G: Tensor) -> Tensor:
    """1 / diag(G), (d,) fp32; 0 for dead inputs, and for those whose inverse overflows."""
    diagonal = G.diagonal().float()
    return torch.where(diagonal >= torch.finfo(diagonal.dtype).tiny, 1 / diagonal, 0)


def refit(W: Tensor, G: Tensor, mask: Tensor, start: Tensor, steps: int, *, backend: Backend = TORCH) -> Fit:
    """Fit the kept weights by `descend`.

    Kept weights of dead inputs stay as they start, and rows without weights stay empty.

    Args:
        W: (rows, d) the layer's weight, fp32 / bf16 / fp16.
        G: (d, d) Gram matrix, already damped; fp32, or from `Backend.operand`.
        mask: (rows, d) bool.
        start: (rows, d) fp32, where Z starts; entries outside the mask are ignored.
        steps: at least 0. Each is one product, and so is the start.
        backend: the operations.
    """
    Z, E = backend.begin_fit(W, start, mask)
    R = backend.product(E, backend.operand(G))
    # Free its memory for the steps.
    del E
    descend(Z, R, G, mask, steps, backend=backend)
    return Fit(mask, Z, R, backend.row_errors(W, R, Z))


def descend(Z: Tensor, R: Tensor, G: Tensor, mask: Tensor | None, steps: int, *, backend: Backend = TORCH) -> None:
    """Preconditioned conjugate gradients on `sum(Z * (Z G)) / 2 - sum(Z * B)` for R = B - Z G, in place.

    A step is one product, P G, and what `naive_fits.conjugate_step` does with it. In fp32 none raises the objective.

    Args:
        Z, R: (rows, d) fp32, the weights and their residual; both are moved.
        G: (d, d), as in `refit`.
        mask: (rows, d) bool, the weights that move; None moves all.
        steps, backend: as in `refit`.
    """
    if not steps:
        return
    G_operand, U = backend.operand(G), torch.empty_like(Z)
    # Z moves along the P that the product reads, rounded or not, so that R stays the residual of Z.
    P = torch.empty_like(Z, dtype=G_operand.dtype)
    rz, enough = Z.new_empty(2, len(Z))
    state = (Z, R, P, U, rz, enough, inverse_diagonal(G))
    backend.conjugate_step(*state, mask=mask, first=True)
    for step in range(1, steps + 1):
        backend.product(P, G_operand, out=U)
        backend.conjugate_step(*state, mask=mask, last=step == steps)
