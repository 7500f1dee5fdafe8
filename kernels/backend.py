"""Backend: the operations of one kernel at one precision, as the solver and the calibration call them.

Frank-Wolfe and conjugate gradients multiply at `precision`. Errors and the start of swaps need exact products, which
are as accurate as products in fp32. At "ieee" exact products are computed in fp32. At "tf32" and "bf16", exact products
of 16-bit weights split each operand into a sum of two bf16 matrices, see `Terms`. All other exact products have the
precision "tf32x3", which splits each operand into a sum of two tf32 matrices.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from . import cpu
from .cpu.vertex_products import VertexProducts
from .definitions import RowState, check_precision
from .plain import row_blocks, row_errors


@dataclass(frozen=True)
class Terms:
    """Two bf16 matrices whose sum represents a matrix, within 2^-17 of each entry. Products of bf16 values are exact.

    Attributes:
        high: the matrix, rounded to bf16.
        low: the matrix minus `high`, rounded to bf16; None if the matrix is bf16.
    """

    high: Tensor
    low: Tensor | None


def split(X: Tensor) -> Terms:
    """Split X (rows, d) into terms. A bf16 matrix has one term, X."""
    if X.dtype == torch.bfloat16:
        return Terms(X, None)
    high = X.bfloat16()
    low = torch.empty_like(high)
    # In blocks of rows, no second fp32 matrix is allocated.
    for rows in row_blocks(X):
        low[rows] = X[rows] - high[rows]
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

    def product(self, E: Tensor, G: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute E G, (rows, d) fp32."""
        return self.operations.product(E, G, precision=self.precision, out=out)

    def product_transposed(self, E: Tensor, C: Tensor) -> Tensor:
        """Compute E C^T, (rows, d) fp32, for any square matrix C.

        The Triton kernels read rows of their right operand in place of columns, so they compute E C^T from C.
        """
        return self.product(E, C.T if self.operations is cpu else C)

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
        out: Tensor | None = None
        # The small products are added first, since a small sum has small rounding errors.
        for e, g in ((left.high, G.low), (left.low, G.high), (left.high, G.high)):
            if e is not None and g is not None:
                out = self.operations.product(e, g, precision="bf16", out=out, add=out is not None)
        assert out is not None
        return out

    def errors(self, E: Tensor, G: Tensor | Terms) -> Tensor:
        """Compute sum(E * (E G)) of every row by `exact_product`, (rows,) fp32; G is from `exact_operand`."""
        return row_errors(E, self.exact_product(E, G))

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

    def mirror_lower(self, G: Tensor) -> Tensor:
        """Copy the lower triangle of G to the upper one, in place."""
        return self.operations.mirror_lower(G)

    def lmo(
        self,
        score: Tensor,
        k: int | Tensor,
        *,
        group: int = 0,
        fixed: Tensor | None = None,
        positive: bool = False,
        check_nan: bool = True,
    ) -> Tensor:
        """Choose the vertex that keeps the k best scores of every row or group, (rows, d) bool; see `lmo.py`."""
        return self.operations.lmo(score, k, group=group, fixed=fixed, positive=positive, check_nan=check_nan)

    def round_mask(self, M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
        """Choose the binary mask of the k highest M of every row or group, (rows, d) bool; see `rounding.py`."""
        return self.operations.round_mask(M, saliency, k, group=group)

    def row_step(
        self,
        state: RowState,
        *,
        theta: float | Tensor = 0.0,
        next_theta: float | Tensor = 0.0,
        eta: float | Tensor | None = None,
    ) -> None:
        """Make a Frank-Wolfe step except for its product, in place; see `step.py`."""
        self.operations.row_step(state, theta=theta, next_theta=next_theta, eta=eta)

    def spread(self, values: Tensor) -> Tensor:
        """Spread values (rows,) evenly over the rows that share a budget. Here each row has a budget of its own."""
        return values

    def row_swaps(
        self, W: Tensor, G: Tensor, R: Tensor, V: Tensor, limit: int, *, group: int = 0, fixed: Tensor | None = None
    ) -> None:
        """Lower the error of every row's mask by 1-swaps, in place; see `swaps.py`."""
        self.operations.row_swaps(W, G, R, V, limit, group=group, fixed=fixed)

    def conjugate_step(
        self,
        Z: Tensor,
        R: Tensor,
        P: Tensor,
        U: Tensor,
        rz: Tensor,
        enough: Tensor,
        inverse: Tensor,
        *,
        mask: Tensor | None = None,
        first: bool = False,
        last: bool = False,
    ) -> None:
        """Make a step of conjugate gradients except for its product, in place; see `conjugate.py`."""
        self.operations.conjugate_step(Z, R, P, U, rz, enough, inverse, mask=mask, first=first, last=last)

    def take_rows(self, X: Tensor, Y: Tensor, taken: Tensor) -> None:
        """Set X[taken] = Y[taken] in place; see `take_rows.py`."""
        self.operations.take_rows(X, Y, taken)

    def adam_step(
        self, W: Tensor, gradient: Tensor, index: Tensor, weight: Tensor, m: Tensor, v: Tensor, *, rate: float,
        step: int,
    ) -> None:  # fmt: skip
        """Make a step of Adam for the entries of W at `index`, in place; see `adam.py`."""
        self.operations.adam_step(W, gradient, index, weight, m, v, rate=rate, step=step)

    def repeat(self, step: Callable[..., object], numbers: Sequence[Sequence[float]], like: Tensor) -> Iterator[None]:
        """Run step(*row) for every row of `numbers`, and yield after each run; see `repeat.py`."""
        return self.operations.repeat(step, numbers, like)


# Plain torch in fp32, for any machine.
TORCH = Backend(cpu)


def load_backend(kernel: str, precision: str) -> Backend:
    """Load the backend of a kernel, by its name in KERNELS. No other function imports Triton."""
    return Backend(importlib.import_module(f".{KERNELS[kernel]}", __package__), precision)
