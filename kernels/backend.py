"""Backend: the operations of one kernel at one precision, as the solver and the calibration call them.

Iterations multiply at `precision`. Errors and the start of swaps need exact products, which are as good as fp32. At
"ieee" these are products in fp32. At "tf32" and "bf16" the operands of 16-bit weights are sums of two bf16 matrices,
see `Terms`. Other products are "tf32x3": each operand is the sum of two tf32 numbers.
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
    """A matrix as the sum of two bf16 matrices, within 2^-17 of each entry; products of bf16 numbers are exact.

    Attributes:
        high: the matrix, rounded to bf16.
        low: the rest, rounded to bf16; None if there is none.
    """

    high: Tensor
    low: Tensor | None


# Rows that are split at once.
SPLIT = 1024


def split(X: Tensor) -> Terms:
    """X (rows, d) as terms; a bf16 matrix has one."""
    if X.dtype == torch.bfloat16:
        return Terms(X, None)
    high = X.bfloat16()
    low = torch.empty_like(high)
    # Some rows at a time, so that no second fp32 matrix is allocated.
    for rows in range(0, len(X), SPLIT):
        part = slice(rows, rows + SPLIT)
        low[part] = torch.sub(X[part], high[part])
    return Terms(high, low)


# The kernels that `--kernel` names, and the module with the operations of each.
KERNELS = {"triton": "triton_ops", "torch": "cpu"}


@dataclass(frozen=True)
class Backend:
    """The operations of one kernel at one precision.

    Attributes:
        operations: the module with the operations: `cpu` or `triton_ops`.
        precision: precision of the products, one of PRECISIONS.
    """

    operations: ModuleType = field(repr=False)
    precision: str = "ieee"

    def __post_init__(self) -> None:
        check_precision(self.precision)

    @property
    def exact_precision(self) -> str:
        """The precision of exact products."""
        return "ieee" if self.precision == "ieee" else "tf32x3"

    @property
    def input_precision(self) -> str:
        """The precision of Gram and cross matrices of fp32 inputs. Products of 16-bit inputs are exact at any."""
        return "ieee" if self.precision in ("ieee", "tf32x3") else "tf32"

    @property
    def thread_safe(self) -> bool:
        """Whether several threads may use the backend at once. Triton's interpreter allows one thread only."""
        return self.operations is cpu

    def operand(self, X: Tensor) -> Tensor:
        """X as an operand of many products: in bf16 if they round it to bf16 anyway, which halves its bytes."""
        return X.to(self.operand_dtype(X.dtype))

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of an operand that is made of numbers of a dtype."""
        return torch.bfloat16 if self.precision == "bf16" else dtype

    def begin_fit(self, W: Tensor, start: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Z = mask * start and the operand W - Z."""
        return self.operations.begin_fit(W, start, mask, dtype=self.operand_dtype(torch.float32))

    def product(self, E: Tensor, G: Tensor, out: Tensor | None = None) -> Tensor:
        """E G, (rows, d) fp32."""
        return self.operations.product(E, G, precision=self.precision, out=out)

    def product_transposed(self, E: Tensor, C: Tensor) -> Tensor:
        """E C^T, (rows, d) fp32, for any square matrix C."""
        return self.operations.product_transposed(E, C, precision=self.precision)

    def exact_operand(self, G: Tensor, dtype: torch.dtype) -> Tensor | Terms:
        """G (d, d) fp32 as the right operand of exact products with weights of `dtype`.

        16-bit weights, and differences of them, are one or two bf16 numbers. Then two or three bf16 products of terms
        are as good as tf32x3, at a fraction of its time.
        """
        return G if self.precision not in ("tf32", "bf16") or dtype == torch.float32 else split(G)

    def exact_product(self, E: Tensor, G: Tensor | Terms) -> Tensor:
        """E G, (rows, d) fp32, as good as in fp32; G as `exact_operand` gives it."""
        if isinstance(G, Tensor):
            return self.operations.product(E, G, precision=self.exact_precision)
        left = split(E)
        pairs = [(left.high, G.low), (left.low, G.high), (left.high, G.high)]
        out = torch.empty(E.shape, dtype=torch.float32, device=E.device)
        # The large products last, so that the small ones are rounded finely.
        for number, (e, g) in enumerate((e, g) for e, g in pairs if e is not None and g is not None):
            self.operations.product(e, g, precision="bf16", out=out, add=number > 0)
        return out

    def errors(self, E: Tensor, G: Tensor | Terms) -> Tensor:
        """sum(E * (E G)) of every row, (rows,) fp32, from an exact product."""
        return self.row_errors(E, self.exact_product(E, G))

    def product_of_vertex(
        self, W: Tensor, G: Tensor, target_gap: Tensor | None, *, V: Tensor, E: Tensor, out: Tensor
    ) -> Callable[[], Tensor]:
        """A function that writes the product of the current vertex to `out`.

        The caller changes V and E in place between two calls. Torch on a CPU adds what changed since an earlier vertex,
        see `vertex_products`. Otherwise the whole of E is multiplied.

        Args:
            W: (rows, d) weight.
            G: (d, d), from `operand`.
            target_gap: (rows, d) fp32, target minus W; None if they are the same.
            V: (rows, d) bool, vertex.
            E: (rows, d), target_gap + W * (1 - V), in the dtype that `operand` gives.
            out: (rows, d) fp32, written and returned.
        """
        if self.operations is cpu and W.device.type == "cpu":
            products = VertexProducts(W, G, target_gap, precision=self.precision)
            return lambda: products(V, out=out)
        return lambda: self.product(E, G, out=out)

    def gram_accumulate(self, G: Tensor, X: Tensor) -> Tensor:
        """Lower triangle of G += X^T X in place."""
        return self.operations.gram_accumulate(G, X, precision=self.input_precision)

    def cross_accumulate(self, B: Tensor, D: Tensor, X: Tensor) -> Tensor:
        """B += D^T X in place."""
        return self.operations.cross_accumulate(B, D, X, precision=self.input_precision)

    def __getattr__(self, name: str) -> Any:
        """The operations that take no precision, as they are: `lmo`, `row_step`, `removed` and others."""
        return getattr(self.operations, name)


# Plain torch in fp32, which every machine can run.
TORCH = Backend(cpu)


def load_backend(kernel: str, precision: str) -> Backend:
    """The backend of a kernel that KERNELS names; Triton is imported only here."""
    return Backend(importlib.import_module(f".{KERNELS[kernel]}", __package__), precision)
