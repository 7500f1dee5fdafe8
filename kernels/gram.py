"""gram_accumulate: add X^T X to the lower triangle of a Gram matrix (the Hessian of SparseGPT and GPTQ), in place.

    X (tokens, d) fp32 / bf16 / fp16     G (d, d) fp32

Entries above the diagonal are undefined until `mirror_lower` overwrites them, after the last of many calls. A copy of
the triangle in each call would double the bytes of G. accumulate.py has the kernels.
"""

import torch
from torch import Tensor

from .accumulate import accumulate, cost
from .definitions import round_operand
from .launch import FLOATS, FP32, check, check_matrix
from .operation import BULK, NVIDIA, Arguments, Size, launch, operation
from .product import library


def reference(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Compute the operation in plain torch, and the upper triangle of the product as well."""
    X = round_operand(X, precision)
    return G.add_(X.T @ X)


def example(size: Size, *, precision: str = "ieee") -> Arguments:
    """Make inputs, and a sum of no inputs: the library's product, which overwrites it, is a fair rival."""
    G = torch.zeros(size.d, size.d, device=size.device)
    return dict(G=G, X=size.normal(size.tokens, size.d, dtype=size.dtype), precision=precision)


@operation(
    reference, lambda G, X, precision: cost(G, X, precision, triangle=True), example,
    writes=("G",), result=lambda _, G: (G.tril(),), tolerance=None,
    library=lambda G, X, precision: library(X, X, precision=precision, out=G, transposed=True),
    launches=(
        launch(BULK, d=14336, dtype=torch.float16),
        # Rows are not aligned for bulk copies.
        launch(BULK, d=4100),
        launch(NVIDIA, dtype=torch.float32, precision="tf32"),
    ),
)  # fmt: skip
def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add X^T X to the lower triangle of G in place.

    Args:
        G: (d, d) fp32, any strides. Entries above its diagonal become undefined.
        X: (tokens, d), fp32 / bf16 / fp16, any strides.
        precision: rounding of fp32 inputs, "ieee" or "tf32".

    Returns:
        G.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    d = check_matrix("X", X, FLOATS)[1]
    check("G", G, (d, d), FP32, X)
    return accumulate(G, X, X, precision, triangle=True)
