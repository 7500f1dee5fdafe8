"""Damp the Gram matrix, and find the targets of layers.

A target is the weight with which a layer would make up for the pruning of the layers before it. Because of that pruning
the layer outputs Y = W X for its input X, where the same layer of the dense model outputs Y + D. The target makes up
for the difference D as far as the input allows:

    T minimises ||D - (T - W) X||_F^2,    so that    (T - W) G = B,    G = X X^T,  B = D X^T

Pruning then approximates T in place of W. The output of a layer that adds to the residual stream includes that stream.

B is computed from one of three matrices, depending on what calibration has measured. X_dense is the layer's input in
the dense model, S the stream after the layer in the dense model, and h the stream before the layer plus the bias:

    "inputs":   C^T = X (X_dense - X)^T, and B = W C, where the layer's output is its product: D = W X_dense - W X
    "streams":  (S - h) X^T, and B = (S - h) X^T - W G, where it adds its product to the stream: D = S - (h + W X)
    "outputs":  B itself, from the outputs of both models

The first two subtract no outputs: those are rounded in bf16, and nearly the same in both models. The first matrix is
the same for all layers that read X.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend, Terms
from sparsefw.solver.refit import descend

# Conjugate-gradient steps from a layer's weight to its target.
TARGET_STEPS = 4

# For damping, a diagonal entry counts as at least this share of the median of those above 0. Otherwise the weights of a
# nearly dead input could become huge, and ruin the first text in which it is alive.
FLOOR = 0.01


def damped(G: Tensor, damp: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make H: a copy of G with damp max(diag G, FLOOR m) added to its diagonal, m the median of its positive entries.

    Damping treats every input as slightly more independent of the others. It draws refitted weights towards the layer's
    own weights, and masks towards the weights that matter most by themselves.

    Args:
        G: (d, d) fp32 Gram matrix.
        damp: share of the diagonal that is added; 0 returns G.
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
    """Cross matrix that calibration has measured of a layer, from which B is computed.

    Attributes:
        of: "inputs", "streams" or "outputs", see the module.
        matrix: (d, d) fp32 of "inputs"; (rows, d) fp32 of the others.
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
        crosses: cross matrix of each layer; None: its target is its own weight, and its B is 0.
        places: for each layer the slice of its rows, and the slice of W that holds them.
        W: (rows, d) weights. Rows that belong to no layer are padding.
        G: (d, d) Gram matrix without damping, from `Backend.exact_operand`.
        backend: the operations.
    """
    B = torch.zeros(W.shape, dtype=torch.float32, device=W.device)
    of = {cross.of: cross.matrix for cross in crosses if cross}
    # One product for all rows: the result of a row must not depend on the other layers.
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

    Some directions of the input hardly vary, and say little about D. Few steps on H leave T close to W in these.

    Args:
        W: (rows, d) the layers' weights, fp32 / bf16 / fp16.
        H: (d, d) damped Gram matrix; fp32, or from `Backend.operand`.
        B: (rows, d) fp32; overwritten.
        steps: number of conjugate-gradient steps, of one product each.
        support: (rows, d) bool, True where a weight may change; None: everywhere.
        backend: the operations.
    """
    T = W.to(B.dtype, copy=True)
    descend(T, B, H, support, steps, backend=backend)
    return T
