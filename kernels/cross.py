"""cross_accumulate: add D^T X to B in place.

    D (tokens, rows), X (tokens, d) fp32 / bf16 / fp16, of the same dtype     B (rows, d) fp32

accumulate.py has the kernels.
"""

import torch
from torch import Tensor

from .accumulate import accumulate, cost
from .definitions import round_operand
from .launch import FLOATS, FP32, check, check_matrix
from .operation import BULK, NVIDIA, Arguments, Size, launch, operation
from .product import library


def reference(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Compute the operation in plain torch."""
    return B.add_(round_operand(D, precision).T @ round_operand(X, precision))


def example(size: Size, *, precision: str = "ieee") -> Arguments:
    """Make inputs, and a sum of no inputs: the library's product, which overwrites it, is a fair rival."""
    D, X = (size.normal(size.tokens, n, dtype=size.dtype, seed=n) for n in (size.rows, size.d))
    return dict(B=torch.zeros(size.rows, size.d, device=size.device), D=D, X=X, precision=precision)


@operation(
    reference, lambda B, X, precision: cost(B, X, precision), example,
    writes=("B",), tolerance=None,
    library=lambda B, D, X, precision: library(D, X, precision=precision, out=B, transposed=True),
    launches=(
        # Rows are not aligned for bulk copies.
        launch(BULK, 4100, 4100),
        launch(NVIDIA, dtype=torch.float32, precision="tf32"),
        launch(NVIDIA, 576, 576, dtype=torch.float32),
    ),
)  # fmt: skip
def cross_accumulate(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add D^T X to B in place.

    Args:
        B: (rows, d) fp32, any strides.
        D: (tokens, rows), dtype of X, any strides.
        X: (tokens, d), fp32 / bf16 / fp16, any strides.
        precision: rounding of fp32 inputs, "ieee" or "tf32".

    Returns:
        B.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    tokens, d = check_matrix("X", X, FLOATS)
    rows = check_matrix("D", D, (X.dtype,))[1]
    check("D", D, (tokens, rows), (X.dtype,), X)
    check("B", B, (rows, d), FP32, X)
    return accumulate(B, D, X, precision)
