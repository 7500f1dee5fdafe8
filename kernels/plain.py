"""Operations in plain torch for both kernels: each passes over its matrices once, a few times in a solve."""

import torch
from torch import Tensor

from .definitions import widened
from .masks import as_float, masked


def removed(W: Tensor, mask: Tensor, target_gap: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Compute target_gap + W * (1 - mask)."""
    E = masked(W, ~mask)
    if target_gap is not None:
        # In place if the sum has the dtype of W.
        E = E.add_(target_gap) if E.dtype == target_gap.dtype else target_gap + E
    return E if out is None else out.copy_(E)


def begin_fit(W: Tensor, start: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Compute Z = mask * start, and W - Z."""
    Z = masked(widened(start), mask)
    return Z, torch.sub(W, Z).to(dtype)


def row_errors(W: Tensor, R: Tensor, Z: Tensor | None = None) -> Tensor:
    """Compute sum((W - Z) * R) of every row."""
    E = W * R if Z is None else widened(W).sub(Z).mul_(R)
    return E.sum(1)


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
    """Compute the candidate weights and their scores."""
    candidate = masked(R * inverse, ~mask if support is None else ~mask & support).add_(Z)
    score = torch.abs(candidate).mul_(root)
    return candidate, score if margin is None else score.mul_(as_float(mask).mul_(margin[:, None]).add_(1))


def bound_scores(
    W: Tensor, R: Tensor, M: Tensor, *, target_gap: Tensor | None = None, damping: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the scores by which the bound's vertex is chosen, and the constant term of the bound."""
    if damping is not None:
        E = (1 - M).mul_(W)
        E = E if target_gap is None else E.add_(target_gap)
        R = torch.sub(R, E.mul_(damping), out=E)
    return W * R, R.new_zeros(len(R)) if target_gap is None else (target_gap * R).sum(1)


def bound_sums(score: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """Compute sum(score * (1 + M - 2 V)) of every row."""
    return as_float(V).mul_(-2).add_(M).add_(1).mul_(score).sum(1)
