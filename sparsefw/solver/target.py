"""Targets: the weights with which a layer would make up for the pruning of the layers before it.

Earlier layers are pruned, so a layer outputs Y = W X for its input X, and the same layer of the dense model outputs
Y + D. The target makes up for the difference D as far as the input allows:

    T minimises ||D - (T - W) X||_F^2,    so that    (T - W) G = B,    G = X X^T,  B = D X^T

Pruning then approximates T instead of W, so that each layer repairs the errors of the layers before it. The output of a
layer that writes to the residual stream includes that stream.

B comes from one of three matrices, whichever calibration has measured. X_dense is the layer's input in the dense model,
S the stream behind the layer in the dense model, h the stream before it plus the bias:

    "inputs":   C^T = X (X_dense - X)^T, and B = W C, where the layer's output is its product: D = W X_dense - W X
    "streams":  (S - h) X^T, and B = (S - h) X^T - W G, where it adds its product to the stream: D = S - (h + W X)
    "outputs":  B itself, from outputs of both models

The first two subtract no outputs, which are rounded in bf16 and nearly the same. The first is one matrix for all layers
that read X, whatever their rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend, Terms
from sparsefw.ranks import DONE, Handle
from sparsefw.solver.refit import descend


@dataclass(frozen=True)
class Cross:
    """A measured difference between the dense model's outputs and a layer's own, see the module.

    Attributes:
        of: "inputs", "streams" or "outputs".
        matrix: (d, d) fp32 of inputs; else (rows, d) fp32.
        arrived: wait for it before the matrix is used.
    """

    of: str
    matrix: Tensor
    arrived: Handle = DONE


def cross_rows(
    crosses: Sequence[tuple[Cross | None, int]], first: int, W: Tensor, G: Tensor | Terms, *, backend: Backend = TORCH
) -> Tensor:
    """Rows of B for stacked layers that read one input, (rows, d) fp32.

    Args:
        crosses: what was measured of each layer, and its rows; None: the layer is to be approximated itself.
        first: number of the first row in the stack.
        W: (rows, d) these rows of the stack. Rows behind the last layer are padding.
        G: (d, d) Gram matrix, not damped, from `Backend.exact_operand`.
        backend: the operations.
    """
    # All rows are multiplied at once, so that a row's result does not depend on the layers beside it.
    products: dict[str, Tensor] = {}
    B, start = torch.zeros(W.shape, dtype=torch.float32, device=W.device), 0
    for cross, rows in crosses:
        low, high = max(first, start), min(first + len(W), start + rows)
        if cross and low < high:
            here, there = slice(low - first, high - first), slice(low - start, high - start)
            if cross.of == "inputs":
                if "inputs" not in products:
                    products["inputs"] = backend.product_transposed(backend.operand(W), backend.operand(cross.matrix))
                B[here] = products["inputs"][here]
            elif cross.of == "streams":
                if "streams" not in products:
                    products["streams"] = backend.exact_product(W, G)
                torch.sub(cross.matrix[there], products["streams"][here], out=B[here])
            else:
                B[here] = cross.matrix[there]
        start += rows
    return B


def find_target(
    W: Tensor, G: Tensor, B: Tensor, steps: int, *, support: Tensor | None = None, backend: Backend = TORCH
) -> Tensor:
    """T, by conjugate gradients from W; (rows, d) fp32.

    Few steps on a damped G leave T close to W in directions in which the input hardly varies and says little about D.

    Args:
        W: (rows, d) the layer's weight, fp32 / bf16 / fp16.
        G: (d, d) Gram matrix, already damped; fp32, or from `Backend.operand`.
        B: (rows, d) fp32 cross matrix; overwritten.
        steps: number of conjugate-gradient steps; each is one product.
        support: (rows, d) bool, weights that may change; None: all.
        backend: the operations.
    """
    T = W.to(B.dtype, copy=True)
    descend(T, B, G, support, steps, backend=backend)
    return T
