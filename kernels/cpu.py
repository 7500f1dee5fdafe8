"""Operations in plain torch, arranged for a CPU, for `--kernel torch`.

For formulas and arguments see the Triton kernel of the same name. Tests compare both with a plain specification. The
operations work in place, in blocks of rows that stay in the cache, and without arithmetic on bool tensors
(`topk_torch.py` says why). They make few temporaries, since the system may take longer to allocate one than torch to
compute it. The results are the same for any size of the blocks. The operations also run on a GPU, but are not tuned for
GPUs.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from .definitions import ADAM_EPSILON, CONVERGED, DECAYS, LEAST_GAIN, RowState, check_budget, check_precision
from .topk_torch import as_float, at_least, infinite, masked, row_blocks, select

# Number of rows in a panel of a Gram matrix. The lower triangle, computed in panels, has half of the flops of the full
# square, and takes 0.6 to 0.7 of its time.
PANEL = 192

# Number of rows that are mirrored at a time, so that no second G is allocated.
MIRRORED = 512


def round_operand(X: Tensor, precision: str) -> Tensor:
    """Convert X to fp32, rounded as tensor cores round it at `precision`."""
    check_precision(precision)
    X = X.float()
    if precision == "ieee":
        return X
    if precision == "tf32x3":
        high = round_operand(X, "tf32")
        return round_operand(X - high, "tf32").add_(high)
    if precision == "bf16":
        return X.bfloat16().float()
    bits = X.view(torch.int32)
    # Round the integer to nearest even at bit 13. A carry into the exponent gives the right result as well.
    even = (bits >> 13).bitwise_and_(1)
    return even.add_(bits).add_(0xFFF).bitwise_and_(~0x1FFF).view(torch.float32)


def product(E: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None, add: bool = False) -> Tensor:
    """Compute E G."""
    if add:
        assert out is not None
        return out.addmm_(round_operand(E, precision), round_operand(G, precision))
    return torch.mm(round_operand(E, precision), round_operand(G, precision), out=out)


def product_transposed(E: Tensor, C: Tensor, *, precision: str = "ieee") -> Tensor:
    """Compute E C^T."""
    return product(E, C.T, precision=precision)


def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add X^T X to the lower triangle of G in place, in panels of rows."""
    X = round_operand(X, precision)
    for start in range(0, len(G), PANEL):
        stop = start + PANEL
        G[start:stop, :stop].addmm_(X[:, start:stop].T, X[:, :stop])
    return G


def mirror_lower(G: Tensor) -> Tensor:
    """Copy the lower triangle of G to the upper one, in place."""
    for start in range(0, len(G), MIRRORED):
        stop = start + MIRRORED
        G[start:stop, stop:] = G[stop:, start:stop].T
        block = G[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).T)
    return G


def cross_accumulate(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add D^T X to B in place."""
    return B.addmm_(round_operand(D, precision).T, round_operand(X, precision))


def lmo(
    score: Tensor,
    k: int | Tensor,
    *,
    group: int = 0,
    fixed: Tensor | None = None,
    positive: bool = False,
    check_nan: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Choose the vertex that keeps the k best scores of every row, by `topk_torch.select`."""
    check_budget(score.shape, k, group)
    # The maximum of a row with a NaN is NaN.
    if check_nan and score.numel() and score.amax(1).isnan().any():
        raise ValueError("score: contains NaN")
    out = torch.empty(score.shape, dtype=torch.bool, device=score.device) if out is None else out
    return select(score, k, group=group, fixed=fixed, positive=positive, out=out)


def row_step(
    state: RowState,
    *,
    eta: float | Tensor | None = None,
    theta: float | Tensor = 0.0,
    next_theta: float | Tensor = 0.0,
) -> None:
    """Make a Frank-Wolfe step in every row, in place, in blocks of rows that stay in the cache.

    The next scores overwrite U. `state.threshold` is ignored.
    """
    W, k, fixed, target_gap = state.W, state.k, state.fixed, state.target_gap
    theta, next_theta = float(theta), float(next_theta)
    for rows in row_blocks(W):
        w, m, r, u, v = W[rows].float(), state.M[rows], state.R[rows], state.U[rows], state.V[rows]
        D, B = as_float(v).sub_(m), u.sub_(r)
        q = w.square().mul_(state.diag) if theta or next_theta else None
        state.eta[rows] = _line_search(w, q, m, r, D, B, theta) if eta is None else eta
        eta_rows = state.eta[rows, None]
        m.addcmul_(D, eta_rows)
        r.addcmul_(B, eta_rows)
        # Half of each score is computed, which selects the same entries.
        score = torch.mul(w, r, out=u)
        removed = 1 - m
        state.error[rows] = (score * removed).sum(1)
        if q is not None and next_theta:
            score.addcmul_(removed.sub_(0.5), q, value=-next_theta)
        budget = k[rows] if isinstance(k, Tensor) else k
        fixed_rows = None if fixed is None else fixed[rows]
        select(score, budget, group=state.group, fixed=fixed_rows, positive=next_theta < 1, out=v)
        removed = torch.mul(w, as_float(~v), out=removed)
        state.E[rows] = removed if target_gap is None else removed.add_(target_gap[rows])


def _line_search(w: Tensor, q: Tensor | None, m: Tensor, r: Tensor, D: Tensor, B: Tensor, theta: float) -> Tensor:
    """Compute the step sizes (rows,) of a line search, with D = V - M and B = U - R."""
    wD = w * D
    # `half` is -lin / 2. There are few calls, since a call on one value a row takes as long as a call on whole rows.
    half, quad = (wD * r).sum(1), wD.mul_(B).sum(1).neg_()
    if q is not None and theta:
        qD = torch.mul(q, D, out=wD)
        half.add_((m - 0.5).mul_(qD).sum(1), alpha=theta)
        quad.sub_(qD.mul_(D).sum(1), alpha=theta)
    return torch.where(quad > 0, (half / quad).clamp_(0, 1), quad < 2 * half)


def repeat(step: Callable[..., object], numbers: Sequence[Sequence[float]], like: Tensor) -> Iterator[None]:
    """Run step(*row) for every row of `numbers`, and yield after each run, as in `repeat.py`. `like` is ignored."""
    for row in numbers:
        step(*row)
        yield


def row_swaps(
    W: Tensor, G: Tensor, R: Tensor, V: Tensor, limit: int, *, group: int = 0, fixed: Tensor | None = None
) -> None:
    """Lower the error of every row's mask by 1-swaps, in place."""
    W = W.float()
    blocks = _diagonal_blocks(G, group or G.shape[1])
    q = W * W * G.diagonal()
    threshold = masked(q, ~V).sum(1).mul_(-LEAST_GAIN)
    rows, r, v = torch.arange(len(W), device=W.device), R.clone(), V.clone()
    fixed_rows = V.new_zeros(()) if fixed is None else fixed
    for _ in range(limit):
        lin = (2 * W).mul_(r)
        a, b = torch.maximum(q + lin, infinite(~v | fixed_rows)), torch.maximum(q - lin, infinite(v))
        i, p, change = _best_swap(W, a, b, blocks)
        active = change < threshold
        if not active.all():
            # Rows without a swap leave the search.
            R[rows], V[rows] = r, v
            W, q, threshold, rows, r, v, i, p = (x[active] for x in (W, q, threshold, rows, r, v, i, p))
            fixed_rows = fixed_rows if fixed is None else fixed_rows[active]
        if not len(rows):
            return
        at = torch.arange(len(rows), device=W.device)
        v[at, i], v[at, p] = False, True
        r += G[i] * W[at, i, None] - G[p] * W[at, p, None]
    R[rows], V[rows] = r, v


def _diagonal_blocks(G: Tensor, m: int) -> Tensor:
    """Return the diagonal blocks of G for groups of m columns, (d / m, m, m)."""
    groups = len(G) // m if m else 1
    return G.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _best_swap(W: Tensor, a: Tensor, b: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best swap of every row: the entries i to remove and p to keep, and the change of the error.

    Args:
        W: (rows, d) fp32.
        a, b: (rows, d), the change of the error if one entry is removed (a) or kept (b); inf where impossible.
        blocks: from `_diagonal_blocks`.
    """
    groups, m, _ = blocks.shape
    shape = (len(W), groups, m)
    w, a, b = W.view(shape), a.view(shape), b.view(shape)
    group = torch.arange(groups, device=W.device)

    def partners(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Find the lowest x of every group and its best partner in y, and then the best of these pairs.
        first = x.argmin(2, keepdim=True)
        pairs = blocks[group, first.squeeze(2)].mul_(w).mul_(2 * w.gather(2, first))
        change, second = (y - pairs).min(2, keepdim=True)
        change += x.gather(2, first)
        change, best = change.min(1, keepdim=True)
        first, second = ((z.gather(1, best) + m * best).view(-1) for z in (first, second))
        return first, second, change.view(-1)

    # The best pair with the lowest a of a group, and the best pair with the lowest b of a group.
    i, p, change = partners(a, b)
    p_b, i_b, change_b = partners(b, a)
    better = change_b < change
    return torch.where(better, i_b, i), torch.where(better, p_b, p), torch.minimum(change, change_b)


def removed(W: Tensor, mask: Tensor, target_gap: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Compute target_gap + W * (1 - mask)."""
    E = masked(W, ~mask)
    if target_gap is not None:
        # In place if the sum has the dtype of W.
        E = E.add_(target_gap) if E.dtype == target_gap.dtype else target_gap + E
    return E if out is None else out.copy_(E)


def begin_fit(W: Tensor, start: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Compute Z = mask * start, and W - Z."""
    Z = masked(start.float(), mask)
    return Z, torch.sub(W, Z).to(dtype)


def row_errors(W: Tensor, R: Tensor, Z: Tensor | None = None) -> Tensor:
    """Compute sum((W - Z) * R) of every row."""
    E = W * R if Z is None else W.float().sub(Z).mul_(R)
    return E.sum(1)


def take_rows(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """Set X[taken] = Y[taken]."""
    if X.device.type != "cpu":
        # Indexing by a bool tensor would make the host wait for the GPU to count the rows.
        X.copy_(torch.where(taken[:, None], Y, X))
        return
    rows = torch.from_numpy(np.flatnonzero(taken.numpy()))
    if len(rows):
        X.index_copy_(0, rows, Y[rows])


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


def round_mask(M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
    """Choose the mask of the k highest M of every row (or group). Ties go to the higher saliency.

    If exactly k entries of a row are at least 1/2, the row keeps these, and needs no search. After a penalty nearly all
    rows are of this kind. Their entries are nearly all 0 or 1, which numpy takes several times as long to partition.
    """
    check_budget(M.shape, k, group)
    shape, width = M.shape, group or M.shape[1]
    M, saliency = M.reshape(-1, width), saliency.reshape(-1, width)
    V = at_least(M, 0.5)
    count = V.view(torch.uint8).sum(1, dtype=torch.int32)
    rest = (count != (k.to(M.device) if isinstance(k, Tensor) else k)).nonzero().squeeze(1)
    if len(rest):
        m, budget = M[rest], k.to(M.device)[rest] if isinstance(k, Tensor) else k
        first = torch.empty(m.shape, dtype=torch.bool, device=m.device)
        select(m, budget, group=group, fixed=None, positive=False, out=first)
        lowest = m.add(as_float(~first), alpha=2).amin(1, keepdim=True)
        order = as_float(at_least(m, lowest)).sub_(as_float(at_least(lowest, m)))
        order.mul_(torch.finfo(torch.float32).max).add_(saliency[rest])
        V[rest] = select(order, budget, group=group, fixed=None, positive=False, out=first)
    return V.view(shape)


def conjugate_step(
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
    """Make a step of conjugate gradients in every row, except for the product, in place, in blocks of rows."""
    for rows in row_blocks(Z):
        r, p = R[rows], P[rows].float()
        if not first:
            u, before = U[rows], rz[rows]
            a = ratio(before, (p * u).sum(1)).masked_fill_(before <= enough[rows], 0)[:, None]
            Z[rows].addcmul_(p, a)
            r.addcmul_(u, -a)
        if last:
            continue
        r = r if mask is None else masked(r, mask[rows])
        z = r * inverse
        now = (r * z).sum(1)
        if first:
            p.copy_(z)
            enough[rows] = CONVERGED * now
        else:
            p.mul_(ratio(now, before)[:, None]).add_(z)
        if p.dtype != P.dtype:
            P[rows] = p
        rz[rows] = now


def adam_step(
    W: Tensor, gradient: Tensor, index: Tensor, weight: Tensor, m: Tensor, v: Tensor, *, rate: float, step: int
) -> None:
    """Make a step of Adam for the entries of W at `index`."""
    # `adam` takes the number of finished steps, and adds 1 to it.
    done = torch.full((), step - 1.0, dtype=torch.float32, device=W.device)
    g = gradient.index_select(0, index).to(weight.dtype)
    adam(
        [weight], [g], [m], [v], [], [done], fused=True, amsgrad=False, maximize=False, weight_decay=0.0,
        beta1=DECAYS[0], beta2=DECAYS[1], lr=rate, eps=ADAM_EPSILON,
    )  # fmt: skip
    W.index_copy_(0, index.long(), weight.to(W.dtype))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide. The result is 0 where the denominator is not positive, since such a row has converged."""
    return torch.where(denominator > 0, numerator / denominator, 0)
