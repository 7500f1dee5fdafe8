"""Refit: the kept weights of a mask make up for the removed ones, by conjugate gradients on the same Gram matrix.

    minimise ||(W - Z) X||_F^2 = sum((W - Z) * ((W - Z) G)) over Z, zero outside the mask

Rows are independent least-squares problems. A step costs one product; the preconditioner is the diagonal of G. G comes
damped, see `damping`: that draws Z towards W, and keeps weights that no input tells apart from growing against each
other.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sparsefw.frank_wolfe import operand
from sparsefw.kernels.selection import keep

# A row is done once <r, z> has fallen to this share of its start: from there on its ratios are rounding errors.
CONVERGED = 1e-12


@dataclass
class Fit:
    """Weights under a mask, and how far they are from the layer's own.

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

    def take_better(self, other: "Fit") -> Tensor:
        """Replace the rows in which the other's error is lower; returns them, (rows,) bool."""
        better = other.error < self.error
        rows = better[:, None]
        self.mask = torch.where(rows, other.mask, self.mask)
        self.Z = torch.where(rows, other.Z, self.Z)
        self.R = torch.where(rows, other.R, self.R)
        self.error = torch.where(better, other.error, self.error)
        return better


def inverse_diagonal(G: Tensor) -> Tensor:
    """1 / diag(G), (d,) fp32; 0 for dead inputs, and for those whose inverse overflows."""
    diagonal = G.diagonal()
    return torch.where(diagonal >= torch.finfo(diagonal.dtype).tiny, 1 / diagonal, 0)


def refit(
    W: Tensor, G: Tensor, mask: Tensor, start: Tensor, steps: int, *, precision: str = "ieee", ops: ModuleType
) -> Fit:
    """Fit the kept weights by `descend`.

    Kept weights of dead inputs stay as they start, and rows without weights stay empty.

    Args:
        W: (rows, d) the layer's weight, fp32 / bf16 / fp16.
        G: (d, d) fp32 Gram matrix, damped as it should be.
        mask: (rows, d) bool.
        start: (rows, d) fp32, where Z starts; what lies outside the mask is ignored.
        steps: at least 0; each is one product, and the start is another one.
        precision: of the products.
        ops: the operations, `sparsefw.kernels.reference` or `sparsefw.kernels.fused`.
    """
    Z = keep(start, mask)
    R = ops.product(W - Z, operand(G, precision), precision=precision)
    descend(Z, R, G, mask, steps, precision=precision, ops=ops)
    return Fit(mask, Z, R, ((W - Z) * R).sum(1))


def descend(
    Z: Tensor, R: Tensor, G: Tensor, mask: Tensor | None, steps: int, *, precision: str = "ieee", ops: ModuleType
) -> None:
    """Preconditioned conjugate gradients on `sum(Z * (Z G)) / 2 - sum(Z * B)` for R = B - Z G, in place.

        r = mask * R, z = r / diag(G), p = z; then per step and row
        a = <r, z> / <p, p G>;  Z += a p;  R -= a p G;  r = mask * R;  p = z + (<r, z> / <r, z>_before) p

    No step raises the objective.

    Args:
        Z, R: (rows, d) fp32, the weights and their residual; both are moved.
        G: (d, d) fp32, damped as it should be.
        mask: (rows, d) bool, the weights that move; None moves all.
        steps, precision, ops: as in `refit`.
    """
    G_operand = operand(G, precision)
    inverse = inverse_diagonal(G)
    P, U, rz, enough = torch.zeros_like(Z), torch.empty_like(Z), None, None
    for _ in range(steps):
        r = R if mask is None else keep(R, mask)
        z = r * inverse
        before, rz = rz, (r * z).sum(1, keepdim=True)
        enough = CONVERGED * rz if enough is None else enough
        P.mul_(0 if before is None else _ratio(rz, before)).add_(z)
        ops.product(P, G_operand, precision=precision, out=U)
        a = _ratio(rz, (P * U).sum(1, keepdim=True)).masked_fill_(rz <= enough, 0)
        Z.addcmul_(P, a)
        R.addcmul_(U, -a)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their ratio; 0 where the denominator is not positive: nothing is left to gain in that row."""
    return torch.where(denominator > 0, numerator / denominator, 0)
