"""Damp the Gram matrix, and find the targets of layers.

A target is the weight with which a layer would make up for the pruning of the layers before it. Because of that pruning
the layer outputs Y = W X for its input X, while the same layer of the dense model outputs Y + D. The target makes up
for the difference D as far as the input X allows:

    T minimises ||D - (T - W) X||_F^2,    so that    (T - W) G = B,    G = X X^T,  B = D X^T

Pruning then approximates T in place of W. If a layer adds its product to the residual stream, the stream after the
layer counts as its output.

B is computed from one of three matrices, depending on what calibration has measured. X_dense is the layer's input in
the dense model, S the stream after the layer in the dense model, and h the stream before the layer in the pruned model
plus the bias:

    "inputs"    for a layer that outputs its product: D = W X_dense - W X.
                The matrix is C^T = X (X_dense - X)^T, and B = W C.
    "streams"   for a layer that adds its product to the stream: D = S - (h + W X).
                The matrix is (S - h) X^T, and B = (S - h) X^T - W G.
    "outputs"   for any other layer. The matrix is B itself, from the layer's outputs in both models.

The first two do not subtract outputs, which are rounded to bf16 and nearly the same in both models. The matrix of
"inputs" is the same for all layers that read X.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend, Terms
from sparsefw.solver.refit import descend

# Conjugate-gradient steps from a layer's weight to its target.
TARGET_STEPS = 4

# Damping counts each diagonal entry as at least this share of the median positive entry. Without this floor the weights
# of a nearly dead input could become huge, and ruin the output on text in which the input is alive.
FLOOR = 0.01


def damped(G: Tensor, damp: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make H: a copy of G with damp max(diag G, FLOOR m) added to its diagonal, m the median positive diagonal entry.

    Damping treats every input as slightly more independent of the others. It draws refitted weights towards the layer's
    own weights, and masks towards the weights of the highest saliency.

    Args:
        G: (d, d) fp32 Gram matrix.
        damp: share of the diagonal that is added; with 0 the result is G in this dtype.
        dtype: dtype of the result.
    """
    if not damp:
        return G.to(dtype)
    diagonal = G.diagonal()
    H = G.to(dtype, copy=True)
    # The median is NaN if all inputs are dead.
    median = diagonal.where(diagonal > 0, torch.nan).nanmedian().item()
    H.diagonal().copy_(diagonal + diagonal.clamp(min=FLOOR * median if median > 0 else 0.0) * damp)
    return H


@dataclass(frozen=True)
class Cross:
    """Cross matrix of a layer, as calibration has measured it. B is computed from it.

    Attributes:
        of: "inputs", "streams" or "outputs", see the module's docstring.
        matrix: fp32, (d, d) for "inputs", and (rows, d) for "streams" and "outputs".
    """

    of: str
    matrix: Tensor


def cross_rows(
    crosses: Sequence[Cross | None],
    places: Sequence[tuple[slice, slice]],
    W: Tensor,
    G: Tensor | Terms,
    *,
    backend: Backend = TORCH,
) -> Tensor:
    """Compute B for rows of stacked layers, (rows, d) fp32.

    Args:
        crosses: cross matrix of each layer; None: the layer's target is its own weight, and its B is 0.
        places: for each layer the slice of its rows, and the slice of W that holds them.
        W: (rows, d) weights. Rows that belong to no layer are padding.
        G: (d, d) Gram matrix without damping, from `Backend.exact_operand`.
        backend: the operations.
    """
    B = torch.zeros(W.shape, dtype=torch.float32, device=W.device)
    of = {cross.of: cross.matrix for cross in crosses if cross}
    # A single product of all rows, so that the result of a row does not depend on which layers the stack has.
    if "inputs" in of:
        from_inputs = backend.product_transposed(backend.operand(W), backend.operand(of["inputs"]))
    if "streams" in of:
        own = backend.exact_product(W, G)
    for cross, (rows, place) in zip(crosses, places, strict=True):
        if cross is None:
            continue
        if cross.of == "inputs":
            B[place] = from_inputs[place]
        elif cross.of == "streams":
            torch.sub(cross.matrix[rows], own[place], out=B[place])
        else:
            B[place] = cross.matrix[rows]
    return B


def find_target(
    W: Tensor, H: Tensor, B: Tensor, steps: int, *, support: Tensor | None = None, backend: Backend = TORCH
) -> Tensor:
    """Find targets T by conjugate gradients that start at W, (rows, d) fp32.

    Along some directions the inputs hardly vary, and say little about D. There, a few steps on H leave T close to W.

    Args:
        W: (rows, d) the layers' weights, fp32 / bf16 / fp16.
        H: (d, d) damped Gram matrix; fp32, or from `Backend.operand`.
        B: (rows, d) fp32; overwritten.
        steps: number of conjugate-gradient steps. Each costs one product.
        support: (rows, d) bool, True where a weight may change; None: everywhere.
        backend: the operations.
    """
    T = W.to(B.dtype, copy=True)
    descend(T, B, H, support, steps, backend=backend)
    return T
