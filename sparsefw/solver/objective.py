"""The objective of a layer, and the damping that makes what is chosen on one text hold on others.

error = ||(T - Z) X||_F^2 = sum(E * (E G)),   E = T - Z,   G = X X^T        Z = M * W for a mask of unchanged weights
"""

import torch
from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend, Terms

# The damping of an input counts its diagonal entry as at least this share of the median entry of inputs that are not
# dead. Without it, the weights of a nearly dead input could become huge and ruin the first text in which it is alive.
FLOOR = 0.01


def damped(G: Tensor, damp: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy of G (d, d) with damp max(diag G, FLOOR m) added to its diagonal, where m is the median of its positive
    entries.

    Damping treats every input as slightly more independent of the others. It draws refitted weights towards the layer's
    own, and masks towards the weights that matter most by themselves.

    Args:
        G: (d, d) fp32.
        damp: share of the diagonal that is added.
        dtype: dtype of the result. In fp32 and without damping it is G itself.
    """
    if not damp:
        return G.to(dtype)
    diagonal = G.diagonal()
    H = G.to(dtype, copy=True)
    # NaN, if all inputs are dead.
    median = diagonal.where(diagonal > 0, torch.nan).nanmedian().item()
    H.diagonal().copy_(diagonal + diagonal.clamp(min=FLOOR * median if median > 0 else 0.0) * damp)
    return H


def mask_error(
    W: Tensor, mask: Tensor, G: Tensor | Terms, target_gap: Tensor | None = None, *, backend: Backend = TORCH
) -> Tensor:
    """Error of a binary mask of unchanged weights, one number per row, (rows,) fp32; G as in `Backend.errors`."""
    return backend.errors(backend.removed(W, mask, target_gap), G)


def weight_error(T: Tensor, Z: Tensor, G: Tensor | Terms, *, backend: Backend = TORCH) -> Tensor:
    """Error of weights Z that approximate T, one number per row, (rows,) fp32; G as in `Backend.errors`."""
    return backend.errors(T.float() - Z.float(), G)


def check_errors(errors: Tensor) -> None:
    """Raise FloatingPointError unless all errors, of any shape, are finite."""
    if not errors.isfinite().all():
        raise FloatingPointError(
            "the layer's error is not finite: NaN or Inf in its weight or Gram matrix, or numbers too large for their "
            "dtype"
        )
