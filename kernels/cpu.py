"""The fast CPU backend, which `--kernel torch` runs: the operations of naive.py with the same names and signatures.

It is not the specification: that is naive.py, where formulas and arguments stand. Here every operation is arranged for
a CPU: in place, in blocks of rows that stay in the cache, without operations on bool tensors (topk_torch.py says why).
It runs on a GPU too, but is not tuned for one. Results do not depend on the size of the blocks.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .cpu_fits import (
    begin_fit,
    bound_scores,
    bound_sums,
    candidates,
    conjugate_step,
    removed,
    round_mask,
    row_errors,
    take_rows,
)
from .naive import LEAST_GAIN, PRECISIONS, check_budget
from .topk_torch import as_float, infinite, masked, row_blocks, select

__all__ = [
    "PRECISIONS",
    "begin_fit",
    "bound_scores",
    "bound_sums",
    "candidates",
    "check_budget",
    "conjugate_step",
    "convex_update",
    "cross_accumulate",
    "gradient",
    "gram_accumulate",
    "lmo",
    "mirror_lower",
    "product",
    "product_transposed",
    "removed",
    "repeat",
    "round_mask",
    "round_operand",
    "row_errors",
    "row_step",
    "row_swaps",
    "take_rows",
]

# Rows of a panel of a Gram matrix: 0.6 to 0.7 of the time of the whole square, where its flops are half.
PANEL = 192

# Rows that are mirrored at once, so that no second G is allocated.
MIRRORED = 512


def round_operand(X: Tensor, precision: str) -> Tensor:
    """X in fp32, rounded to what tensor cores read at `precision`. See `naive.round_operand`."""
    X = X.float()
    if precision == "ieee":
        return X
    if precision == "tf32x3":
        high = round_operand(X, "tf32")
        return round_operand(X - high, "tf32").add_(high)
    if precision == "bf16":
        return X.bfloat16().float()
    if precision == "tf32":
        bits = X.view(torch.int32)
        # Round to nearest even at bit 13, as an integer: the carry into the exponent is the right one.
        even = (bits >> 13).bitwise_and_(1)
        return even.add_(bits).add_(0xFFF).bitwise_and_(~0x1FFF).view(torch.float32)
    raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def product(E: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None, add: bool = False) -> Tensor:
    """E G. See `naive.product`."""
    if add:
        assert out is not None
        return out.addmm_(round_operand(E, precision), round_operand(G, precision))
    return torch.mm(round_operand(E, precision), round_operand(G, precision), out=out)


def product_transposed(E: Tensor, C: Tensor, *, precision: str = "ieee") -> Tensor:
    """E C^T. See `naive.product_transposed`."""
    return product(E, C.T, precision=precision)


def gradient(W: Tensor, M: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None) -> Tensor:
    """-2 W * ((W * (1 - M)) G). See `naive.gradient`."""
    W = W.float()
    out = product(W * (1 - M), G, precision=precision, out=out)
    return out.mul_(W).mul_(-2)


def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Lower triangle of G += X^T X in place, in panels of rows. See `naive.gram_accumulate`."""
    X = round_operand(X, precision)
    for start in range(0, len(G), PANEL):
        stop = start + PANEL
        G[start:stop, :stop].addmm_(X[:, start:stop].T, X[:, :stop])
    return G


def mirror_lower(G: Tensor) -> Tensor:
    """Copy the lower triangle of G to the upper one, in place. See `naive.mirror_lower`."""
    for start in range(0, len(G), MIRRORED):
        stop = start + MIRRORED
        G[start:stop, stop:] = G[stop:, start:stop].T
        block = G[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).T)
    return G


def cross_accumulate(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """B += D^T X in place. See `naive.cross_accumulate`."""
    return B.addmm_(round_operand(D, precision).T, round_operand(X, precision))


def lmo(
    score: Tensor,
    k: int | Tensor,
    *,
    group: int = 0,
    fixed: Tensor | None = None,
    positive: bool = False,
    checked: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """The vertex that keeps the k best scores of every row. See `naive.lmo`; topk_torch.py selects."""
    check_budget(score.shape, k, group)
    # A row with a NaN has a NaN as its maximum.
    if checked and score.numel() and score.amax(1).isnan().any():
        raise ValueError("score: NaN is no choice")
    out = torch.empty(score.shape, dtype=torch.bool, device=score.device) if out is None else out
    return select(score, k, group=group, fixed=fixed, positive=positive, out=out)


def convex_update(M: Tensor, V: Tensor, R: Tensor, U: Tensor, eta: Tensor) -> None:
    """M += eta (V - M) and R += eta (U - R), in place. See `naive.convex_update`."""
    eta = eta[:, None]
    M.add_(as_float(V).sub_(M).mul_(eta))
    R.add_((U - R).mul_(eta))


def row_step(
    W: Tensor,
    diag: Tensor,
    M: Tensor,
    R: Tensor,
    U: Tensor,
    V: Tensor,
    E: Tensor,
    k: int | Tensor,
    *,
    group: int = 0,
    fixed: Tensor | None = None,
    target_gap: Tensor | None = None,
    eta: float | Tensor | None = None,
    theta: float | Tensor = 0.0,
    next_theta: float | Tensor = 0.0,
    threshold: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One Frank-Wolfe step of every row, in place, in blocks of rows that stay in the cache. See `naive.row_step`.

    The next scores overwrite U. The selection needs no threshold to start from.
    """
    step, error = out or W.new_empty(2, len(W), dtype=torch.float32).unbind()
    theta, next_theta = float(theta), float(next_theta)
    for rows in row_blocks(W):
        w, m, r, u, v = W[rows].float(), M[rows], R[rows], U[rows], V[rows]
        D, B = as_float(v).sub_(m), u.sub_(r)
        q = w.square().mul_(diag) if theta or next_theta else None
        step[rows] = _line_search(w, q, m, r, D, B, theta) if eta is None else eta
        eta_rows = step[rows, None]
        m.addcmul_(D, eta_rows)
        r.addcmul_(B, eta_rows)
        # Half of the score selects the same entries. It overwrites U.
        score = torch.mul(w, r, out=u)
        removed = 1 - m
        error[rows] = (score * removed).sum(1)
        if q is not None and next_theta:
            score.addcmul_(removed.sub_(0.5), q, value=-next_theta)
        budget = k[rows] if isinstance(k, Tensor) else k
        fixed_rows = None if fixed is None else fixed[rows]
        select(score, budget, group=group, fixed=fixed_rows, positive=next_theta < 1, out=v)
        removed = torch.mul(w, as_float(~v), out=removed)
        E[rows] = removed if target_gap is None else removed.add_(target_gap[rows])
    return step, error


def _line_search(w: Tensor, q: Tensor | None, m: Tensor, r: Tensor, D: Tensor, B: Tensor, theta: float) -> Tensor:
    """The step sizes (rows,) of `naive.row_step`, with D = V - M and B = U - R."""
    wD = w * D
    # Half of -lin, in few calls: a call on one number per row takes as long as arithmetic on whole rows.
    half, quad = (wD * r).sum(1), wD.mul_(B).sum(1).neg_()
    if q is not None and theta:
        qD = torch.mul(q, D, out=wD)
        half.add_((m - 0.5).mul_(qD).sum(1), alpha=theta)
        quad.sub_(qD.mul_(D).sum(1), alpha=theta)
    return torch.where(quad > 0, (half / quad).clamp_(0, 1), quad < 2 * half)


def repeat(step: Callable[..., object], numbers: Sequence[Sequence[float]], like: Tensor) -> Iterator[None]:
    """Run step(*row) for every row of `numbers`; yields after each. See `naive.repeat`."""
    for row in numbers:
        step(*row)
        yield


def row_swaps(
    W: Tensor, G: Tensor, R: Tensor, V: Tensor, limit: int, *, group: int = 0, fixed: Tensor | None = None
) -> None:
    """Lower the error of every mask by 1-swaps, in place, in all rows at once. See `naive.row_swaps`."""
    W = W.float()
    blocks = _diagonal_blocks(G, group or G.shape[1])
    q = W * W * G.diagonal()
    least = masked(q, ~V).sum(1).mul_(-LEAST_GAIN)
    rows, r, v = torch.arange(len(W), device=W.device), R.clone(), V.clone()
    fixed_rows = V.new_zeros(()) if fixed is None else fixed
    for _ in range(limit):
        lin = (2 * W).mul_(r)
        a, b = torch.maximum(q + lin, infinite(~v | fixed_rows)), torch.maximum(q - lin, infinite(v))
        i, p, change = _best_swap(W, a, b, blocks)
        go = change < least
        if not go.all():
            # Rows without a swap are done and leave the search.
            R[rows], V[rows] = r, v
            W, q, least, rows, r, v, i, p = (x[go] for x in (W, q, least, rows, r, v, i, p))
            fixed_rows = fixed_rows if fixed is None else fixed_rows[go]
        if not len(rows):
            return
        at = torch.arange(len(rows), device=W.device)
        v[at, i], v[at, p] = False, True
        r += G[i] * W[at, i, None] - G[p] * W[at, p, None]
    R[rows], V[rows] = r, v


def _diagonal_blocks(G: Tensor, m: int) -> Tensor:
    """The blocks of G that belong to groups of m columns, (d / m, m, m)."""
    groups = len(G) // m if m else 1
    return G.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _best_swap(W: Tensor, a: Tensor, b: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best swap (i, p) of every row, and its change of the error; a and b (rows, d) are inf where impossible."""
    groups, m, _ = blocks.shape
    shape = (len(W), groups, m)
    w, a, b = W.view(shape), a.view(shape), b.view(shape)
    group = torch.arange(groups, device=W.device)

    def partners(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The best x of every group and its best partner in y; then the best group.
        first = x.argmin(2, keepdim=True)
        pairs = blocks[group, first.squeeze(2)].mul_(w).mul_(2 * w.gather(2, first))
        change, second = (y - pairs).min(2, keepdim=True)
        change += x.gather(2, first)
        change, best = change.min(1, keepdim=True)
        first, second = ((z.gather(1, best) + m * best).view(-1) for z in (first, second))
        return first, second, change.view(-1)

    i, p, change = partners(a, b)
    p_too, i_too, change_too = partners(b, a)
    better = change_too < change
    return torch.where(better, i_too, i), torch.where(better, p_too, p), torch.minimum(change, change_too)
