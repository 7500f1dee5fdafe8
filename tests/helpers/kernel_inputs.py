"""Inputs and comparisons that the kernel tests share."""

from typing import Any

import pytest
import torch
from helpers import numerics
from torch import Tensor

from sparsefw.kernels import triton_ops
from sparsefw.kernels.definitions import RowState
from sparsefw.kernels.launch import platform
from sparsefw.kernels.operation import OPERATIONS, Size, converted
from sparsefw.kernels.operation import in_float64 as in_float64
from sparsefw.kernels.product import DESCRIPTORS

assert triton_ops  # It fills OPERATIONS.
copied = converted
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS_AS_A_GPU = DEVICE == "cuda" or numerics.installed
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One entry, odd sizes, and more than one tile in every direction.
SHAPES = ((1, 1), (37, 131), (150, 260))
# A test of what only the hardware does, such as the rounding of tensor cores.
needs_gpu = pytest.mark.gpu
needs_bulk_copies = pytest.mark.skipif(
    platform() not in DESCRIPTORS, reason="bulk copies need an NVIDIA GPU, sm_90 or later"
)
shapes = pytest.mark.parametrize("shape", [*SHAPES[:2], pytest.param(SHAPES[2], marks=pytest.mark.slow)])

# Relative rounding of one product of two operands at a precision, with the sum of thousands of products in fp32: tensor
# cores truncate the bits that they shift out.
PRODUCT_ERROR = {"ieee": 2 * 2.0**-23, "tf32x3": 2 * 2.0**-20, "tf32": 2 * 2.0**-10, "bf16": 2 * 2.0**-8}
SUM_ERROR = 2.0**-15

# How much larger than that of naive.py an error may be. Tensor cores cut sums off, which counts where products are
# exact or nearly so: those of 16-bit operands ("exact") and of tf32x3.
TIMES = dict.fromkeys((*PRODUCT_ERROR, "exact"), 2) | ({"tf32x3": 4, "exact": 4} if ROUNDS_AS_A_GPU else {})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(DEVICE, dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=generator(seed)).to(DEVICE)


def hard_scores(rows: int, d: int) -> dict[str, Tensor]:
    """Scores whose keys are far from evenly spread, the worst case for interpolation."""
    x, few = normal(rows, d), uniform(rows, d, seed=1) < 0.05
    return {
        "outliers": torch.where(few, 1e30 * x, x),
        "two far clusters": torch.where(x > 0, 1e30 + 1e28 * x, 1e-30 * x),
        "around zero": torch.where(few, x, 1e-38 * x),
        "any bits": torch.randint(-(2**31), 2**31, (rows, d), generator=generator(2))
        .to(torch.int32).view(torch.float32).nan_to_num(1.0).to(DEVICE),
        "one above equals": torch.where(uniform(rows, d, seed=3) < 0.01, 1.0 + 2**-23, 1.0),
        "infinite": torch.where(few, torch.inf * x.sign(), x),
        "zeros but two": torch.zeros_like(x).index_fill_(1, torch.tensor([d // 3], device=DEVICE), 1000.0)
        .index_fill_(1, torch.tensor([d // 2], device=DEVICE), -1.0),
    }  # fmt: skip


def gram(d: int) -> Tensor:
    """Gram matrix (d, d) of inputs with a common part, as activations have; exactly symmetric."""
    X = torch.randn(300, d, generator=generator(0), dtype=torch.float64)
    X += torch.randn(300, 1, generator=generator(1), dtype=torch.float64)
    G = (X.T @ X).float()
    return (G.tril() + G.tril(-1).T).to(DEVICE)


def garbage(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output in which an entry that was never written shows."""
    return torch.full(shape, True if dtype == torch.bool else torch.nan, dtype=dtype, device=DEVICE)


def strided(X: Tensor) -> Tensor:
    """A view of the same values in which neither dimension is contiguous."""
    wide = torch.zeros(X.shape[1] * 2, X.shape[0] * 3, dtype=X.dtype, device=X.device)
    view = wide[::2, ::3].T
    return view.copy_(X)


def of_wider(X: Tensor) -> Tensor:
    """The same values as the right half of a matrix that is twice as wide."""
    return torch.cat((X, X), 1)[:, X.shape[1] :]


def example(name: str, rows: int, d: int, dtype: torch.dtype = torch.float32, **setting: Any) -> dict[str, Any]:
    """Arguments of an operation, made on the CPU, since a pretended GPU has no generator."""
    arguments = OPERATIONS[name].example(Size(rows, d, 300, dtype, "cpu"), **setting)
    return converted(arguments, lambda x: x.to(DEVICE))


def row_state(W: Tensor, diag: Tensor, *others: Tensor | int, **options: Tensor | int | None) -> RowState:
    """A state of these matrices M, R, U, V, E and budget k; what a step writes to its vectors shows."""
    eta, error = (torch.full((len(W),), torch.nan, dtype=others[0].dtype, device=W.device) for _ in range(2))
    return RowState(W, diag, *others, eta, error, **options)


def assert_near(
    got: Tensor, plain: Tensor, truth: Tensor, beside: Tensor | float = 0.0, precision: str = "ieee"
) -> None:
    """The error of `got` against the float64 truth is at most TIMES that of plain fp32 (naive.py), max and rms.

    A few roundings of the largest value are allowed on top: on tiny inputs plain fp32 may be exact by luck.

    Args:
        got, plain, truth: the values.
        beside: the part of the error of each of them that something else has made, and that is tested by itself.
        precision: the precision of the products, or "exact", see TIMES.
    """
    assert got.shape == truth.shape
    error, allowed = ((got.double() - truth).abs() - beside).clamp(min=0), (plain.double() - truth).abs()
    slack, times = 4 * 2.0**-24 * truth.abs().max(), TIMES[precision]
    assert error.max() <= times * allowed.max() + slack, f"max {error.max():.3g}, plain fp32 {allowed.max():.3g}"
    rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert rms <= times * allowed_rms + slack, f"rms {rms:.3g}, plain fp32 {allowed_rms:.3g}"
