"""The objective of a layer, and the damping that makes what is chosen on one text hold on others.

error = ||(T - Z) X||_F^2 = sum(E * (E G)),   E = T - Z,   G = X X^T        Z = M * W for a mask of unchanged weights
"""

from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend, Terms

# The damping of an input counts its diagonal entry as at least this share of the median entry. Without it, the weights
# of a nearly dead input could become huge and ruin the first text in which the input is alive.
FLOOR = 0.01


def damped(G: Tensor, damp: float) -> Tensor:
    """A copy of G (d, d) with damp max(diag G, FLOOR median(diag G)) added to its diagonal; G itself if damp is 0.

    Damping treats every input as slightly more independent of the others. It draws refitted weights towards the layer's
    own, and masks towards the weights that matter most by themselves.
    """
    if not damp:
        return G
    diagonal = G.diagonal()
    H = G.clone()
    H.diagonal().add_(diagonal.clamp(min=FLOOR * diagonal.median().item()) * damp)
    return H


def mask_error(
    W: Tensor, mask: Tensor, G: Tensor | Terms, target_gap: Tensor | None = None, *, backend: Backend = TORCH
) -> Tensor:
    """Error of a binary mask of unchanged weights, one number per row, (rows,) fp32; G as in `Backend.errors`."""
    return backend.errors(backend.removed(W, mask, target_gap), G)


def weight_error(T: Tensor, Z: Tensor, G: Tensor | Terms, *, backend: Backend = TORCH) -> Tensor:
    """Error of weights Z that approximate T, one number per row, (rows,) fp32; G as in `Backend.errors`."""
    return backend.errors(T.float() - Z.float(), G)
