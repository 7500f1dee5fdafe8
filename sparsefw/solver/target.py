"""Targets: the weights with which a layer would make up for the pruning of the layers before it.

Earlier layers are pruned, so a layer outputs Y = W X for its input X, and the same layer of the dense model outputs
Y + D. The target makes up for the difference D as far as the input allows:

    T minimises ||D - (T - W) X||_F^2,    so that    (T - W) G = B,    G = X X^T,  B = D X^T

Pruning then approximates T instead of W, so that each layer repairs the errors of the layers before it. The output of a
layer that writes to the residual stream includes that stream.
"""

from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver.refit import descend


def find_target(
    W: Tensor, G: Tensor, B: Tensor, steps: int, *, support: Tensor | None = None, backend: Backend = TORCH
) -> Tensor:
    """T, by conjugate gradients from W; (rows, d) fp32.

    Few steps on a damped G leave T close to W in directions in which the input hardly varies and says little about D.

    Args:
        W: (rows, d) the layer's weight, fp32 / bf16 / fp16.
        G: (d, d) fp32 Gram matrix, already damped.
        B: (rows, d) fp32 cross matrix; overwritten.
        steps: number of conjugate-gradient steps; each is one product.
        support: (rows, d) bool, weights that may change; None: all.
        backend: the operations.
    """
    T = W.to(B.dtype, copy=True)
    descend(T, B, G, support, steps, backend=backend)
    return T
