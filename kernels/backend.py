"""Backend: the operations of one kernel at one precision, as the solver and the calibration call them.

Frank-Wolfe and conjugate gradients multiply at `precision`. Errors and the start of swaps need exact products, which
are as accurate as products in fp32. At "ieee" exact products are computed in fp32. At "tf32" and "bf16", exact products
of 16-bit weights split each operand into a sum of two bf16 matrices, see `Terms`. All other exact products have the
precision "tf32x3", which splits each operand into a sum of two tf32 matrices.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .definitions import check_precision
from .vertex_products import VertexProducts


@dataclass(frozen=True)
class Terms:
    """Two bf16 matrices whose sum represents a matrix, within 2^-17 of each entry. Products of bf16 values are exact.

    Attributes:
        high: the matrix, rounded to bf16.
        low: the matrix minus `high`, rounded to bf16; None if the matrix is bf16.
    """

    high: Tensor
    low: Tensor | None


# Number of rows that are split at a time, so that no second fp32 matrix is allocated.
SPLIT = 1024


def split(X: Tensor) -> Terms:
    """Split X (rows, d) into terms. A bf16 matrix has one term, X."""
    if X.dtype == torch.bfloat16:
        return Terms(X, None)
    high = X.bfloat16()
    low = torch.empty_like(high)
    for rows in range(0, len(X), SPLIT):
        part = slice(rows, rows + SPLIT)
        low[part] = torch.sub(X[part], high[part])
    return Terms(high, low)


# Maps each value of `--kernel` to the module with its operations.
KERNELS = {"triton": "triton_ops", "torch": "cpu"}


@dataclass(frozen=True)
class Backend:
    """Operations of one kernel at one precision.

    Attributes:
        operations: the module with the operations, `cpu` or `triton_ops`.
        precision: precision of products, one of PRECISIONS.
    """

    operations: ModuleType = field(repr=False)
    precision: str = "ieee"

    def __post_init__(self) -> None:
        check_precision(self.precision)

    @property
    def exact_precision(self) -> str:
        """Return the precision of exact products."""
        return "ieee" if self.precision == "ieee" else "tf32x3"

    @property
    def input_precision(self) -> str:
        """Return the precision of Gram and cross matrices of fp32 inputs. Products of 16-bit inputs stay exact."""
        return "ieee" if self.precision in ("ieee", "tf32x3") else "tf32"

    @property
    def thread_safe(self) -> bool:
        """Tell whether several threads may use the backend at once. Triton's interpreter allows one thread only."""
        return self.operations is cpu

    def operand(self, X: Tensor) -> Tensor:
        """Convert X before many products. At "bf16" X becomes bf16, since each product would round X anyway."""
        return X.to(self.operand_dtype(X.dtype))

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype to which `operand` converts a matrix of `dtype`."""
        return torch.bfloat16 if self.precision == "bf16" else dtype

    def begin_fit(self, W: Tensor, start: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute Z = mask * start, fp32, and W - Z, in the dtype of an operand."""
        return self.operations.begin_fit(W, start, mask, dtype=self.operand_dtype(torch.float32))

    def product(self, E: Tensor, G: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute E G, (rows, d) fp32."""
        return self.operations.product(E, G, precision=self.precision, out=out)

    def product_transposed(self, E: Tensor, C: Tensor) -> Tensor:
        """Compute E C^T, (rows, d) fp32, for any square matrix C."""
        return self.operations.product_transposed(E, C, precision=self.precision)

    def exact_operand(self, G: Tensor, dtype: torch.dtype) -> Tensor | Terms:
        """Convert G (d, d) fp32 to the right operand of `exact_product`, for weights of `dtype`.

        Two bf16 terms represent a 16-bit weight exactly, and a difference of 16-bit weights within 2^-17. So two or
        three bf16 products of terms replace a product at "tf32x3", in a fraction of its time.
        """
        return G if self.precision not in ("tf32", "bf16") or dtype == torch.float32 else split(G)

    def exact_product(self, E: Tensor, G: Tensor | Terms) -> Tensor:
        """Compute E G as accurately as in fp32, (rows, d) fp32; G is from `exact_operand`."""
        if isinstance(G, Tensor):
            return self.operations.product(E, G, precision=self.exact_precision)
        left = split(E)
        pairs = [(left.high, G.low), (left.low, G.high), (left.high, G.high)]
        out = torch.empty(E.shape, dtype=torch.float32, device=E.device)
        # The small products are added first, since a small sum has small rounding errors.
        for number, (e, g) in enumerate((e, g) for e, g in pairs if e is not None and g is not None):
            self.operations.product(e, g, precision="bf16", out=out, add=number > 0)
        return out

    def errors(self, E: Tensor, G: Tensor | Terms) -> Tensor:
        """Compute sum(E * (E G)) of every row by `exact_product`, (rows,) fp32; G is from `exact_operand`."""
        return self.row_errors(E, self.exact_product(E, G))

    def product_of_vertex(
        self, W: Tensor, G: Tensor, target_gap: Tensor | None, *, V: Tensor, E: Tensor, out: Tensor
    ) -> Callable[[], Tensor]:
        """Return a function that computes E G for the current vertex V, and writes it to `out`.

        The caller changes V and E in place between two calls. With `--kernel torch` on a CPU a call updates the product
        of an earlier vertex, see `vertex_products`. In all other cases each call multiplies E by G.

        Args:
            W: (rows, d) weight.
            G: (d, d), from `operand`.
            target_gap: (rows, d) fp32, target minus W; None if the target is W.
            V: (rows, d) bool, the vertex.
            E: (rows, d) target_gap + W * (1 - V), in the dtype that `operand` gives it.
            out: (rows, d) fp32, written and returned.
        """
        if self.operations is cpu and W.device.type == "cpu":
            products = VertexProducts(W, G, target_gap, precision=self.precision)
            return lambda: products(V, out=out)
        return lambda: self.product(E, G, out=out)

    def gram_accumulate(self, G: Tensor, X: Tensor) -> Tensor:
        """Add X^T X to the lower triangle of G in place."""
        return self.operations.gram_accumulate(G, X, precision=self.input_precision)

    def cross_accumulate(self, B: Tensor, D: Tensor, X: Tensor) -> Tensor:
        """Add D^T X to B in place."""
        return self.operations.cross_accumulate(B, D, X, precision=self.input_precision)

    def __getattr__(self, name: str) -> Any:
        """Return an operation of the module that has no argument `precision`: `lmo`, `row_step` and others."""
        return getattr(self.operations, name)


# Plain torch in fp32, for any machine.
TORCH = Backend(cpu)


def load_backend(kernel: str, precision: str) -> Backend:
    """Load the backend of a kernel, by its name in KERNELS. No other function imports Triton."""
    return Backend(importlib.import_module(f".{KERNELS[kernel]}", __package__), precision)
