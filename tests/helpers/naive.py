"""The specification of the kernels: every operation in plain torch, formula by formula.

Tests hold both implementations against it: cpu.py (`--kernel torch`) and triton_ops.py (`--kernel triton`) define the
same names with the same signatures, and their docstrings say what each argument is. Nothing here is meant to be fast.
Given float64 tensors an operation computes in float64, so that tests can take it for the truth; else it computes in
fp32. `kernels/definitions.py` has the notation.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparsefw.kernels import rounding, triton_ops  # noqa: F401, which fills OPERATIONS
from sparsefw.kernels.definitions import check_precision
from sparsefw.kernels.operation import OPERATIONS


def __getattr__(name: str) -> Callable:
    """The reference of an operation, which lies beside its kernel."""
    if name not in OPERATIONS:
        raise AttributeError(name)
    return OPERATIONS[name].reference


round_mask = partial(rounding.round_mask, __getattr__("lmo"))


def round_operand(X: Tensor, precision: str) -> Tensor:
    """X rounded to the numbers that tensor cores read at `precision`."""
    check_precision(precision)
    X = widened(X)
    if precision == "ieee":
        return X
    if precision == "bf16":
        return X.bfloat16().to(X.dtype)
    high = _to_tf32(X)
    return high if precision == "tf32" else high + _to_tf32(X - high)


def widened(X: Tensor) -> Tensor:
    """X in float64 if it is, else in fp32."""
    return X if X.dtype == torch.float64 else X.float()


def _to_tf32(X: Tensor, whole: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    # |X| = mantissa 2^exponent with a mantissa in [0.5, 1): 11 bits behind the point. Numbers below 2^-126 have fewer.
    exponent = torch.frexp(X).exponent.double().clamp(min=-125)
    unit = torch.pow(2.0, exponent - 11)
    # float64 holds the quotient and the product exactly.
    return (whole(X.double() / unit) * unit).to(X.dtype)


def product(E: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None, add: bool = False) -> Tensor:
    """E G, the one matrix product of an iteration, accumulated in fp32."""
    EG = round_operand(E, precision) @ round_operand(G, precision)
    if add:
        assert out is not None
        return out.add_(EG)
    return EG if out is None else out.copy_(EG)


def product_transposed(E: Tensor, C: Tensor, *, precision: str = "ieee") -> Tensor:
    """E C^T, (rows, d) fp32, for a matrix that need not be symmetric."""
    return product(E, C.T, precision=precision)


def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Lower triangle of G += X^T X in place, accumulated in fp32. `mirror_lower` completes G after the last call."""
    X = round_operand(X, precision)
    return G.add_(X.T @ X)


def cross_accumulate(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """B += D^T X in place, accumulated in fp32: correlates a layer's output error with its input."""
    return B.add_(round_operand(D, precision).T @ round_operand(X, precision))


def removed(W: Tensor, mask: Tensor, target_gap: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """E = target_gap + W * (1 - mask), the weights that a mask removes, as the left operand of a product."""
    E = W.masked_fill(mask, 0)
    E = E if target_gap is None else target_gap + E
    return E if out is None else out.copy_(E)


def begin_fit(W: Tensor, start: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The start of a refit: Z = mask * start, and E = W - Z, whose product is the residual."""
    Z = widened(start).masked_fill(~mask, 0)
    E = widened(W) - Z
    return Z, E if E.dtype == torch.float64 else E.to(dtype)


def row_errors(W: Tensor, R: Tensor, Z: Tensor | None = None) -> Tensor:
    """sum((W - Z) * R) of every row, (rows,) fp32: the error of weights Z that approximate W, if R = (W - Z) G."""
    E = widened(W) if Z is None else widened(W) - widened(Z)
    return (E * R).sum(1)


def candidates(
    Z: Tensor,
    R: Tensor,
    mask: Tensor,
    inverse: Tensor,
    root: Tensor,
    *,
    margin: Tensor | None = None,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights among which a refitted mask is chosen again, and the scores of the choice.

        T     = Z at kept weights and outside the support,  Z + R inverse at the other removed weights
        score = |T| root (1 + margin mask)

    A removed weight stands where an exact step along its own coordinate puts it. |T| root is the square root of the
    error of removing that weight alone.
    """
    removed = ~mask if support is None else ~mask & support
    T = Z + (R * inverse).masked_fill(~removed, 0)
    score = T.abs() * root
    return T, score if margin is None else score * (1 + margin[:, None] * mask)


def bound_scores(
    W: Tensor, R: Tensor, M: Tensor, *, target_gap: Tensor | None = None, damping: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Half of the negative gradient of the error without penalty, and the part of the lower bound that it lacks.

    r        = R - (target_gap + W * (1 - M)) damping
    score    = W r
    constant = sum(target_gap * r)
    """
    w, r = widened(W), R
    if damping is not None:
        E = w * (1 - M)
        r = R - (E if target_gap is None else target_gap + E) * damping
    return w * r, r.new_zeros(len(r)) if target_gap is None else (target_gap * r).sum(1)


def bound_sums(score: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """sum(score * (1 + M - 2 V)) of every row, (rows,) fp32: error(M) - <gradient, M - V>, without the target gap."""
    return (score * (1 + M - 2 * V.to(M.dtype))).sum(1)
