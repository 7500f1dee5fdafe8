"""The specification of the kernels: every operation in plain torch, formula by formula.

Tests hold both implementations against it: cpu.py (`--kernel torch`) and triton_ops.py (`--kernel triton`) define the
same names with the same signatures, and their docstrings say what each argument is. Nothing here is meant to be fast.
Given float64 tensors an operation computes in float64, so that tests can take it for the truth; else it computes in
fp32. `kernels/definitions.py` has the notation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsefw.kernels import definitions, triton_ops  # noqa: F401, which fills OPERATIONS
from sparsefw.kernels.definitions import CONVERGED, LEAST_GAIN, RowState, check_budget, round_operand, widened  # noqa: F401
from sparsefw.kernels.operation import OPERATIONS


def __getattr__(name: str) -> Callable:
    """The reference of an operation, which lies beside its kernel."""
    if name not in OPERATIONS:
        raise AttributeError(name)
    return OPERATIONS[name].reference


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
    """Linear minimization oracle: the vertex that keeps the k best scores of every row, (rows, d) bool.

    Exactly k entries are kept (fewer only under `positive`). Equal scores go to the lower index; -0 equals +0.
    """
    check_budget(score.shape, k, group)
    if check_nan and score.isnan().any():
        raise ValueError("score: contains NaN")
    if fixed is not None:
        score = score.masked_fill(fixed, torch.inf)
    units = score.reshape(-1, group) if group else score
    # Adding +0 makes +0 of -0.
    order = (units + 0.0).sort(dim=1, descending=True, stable=True).indices
    rank = order.argsort(dim=1)
    V = rank < (k.to(rank.device)[:, None] if isinstance(k, Tensor) else k)
    if positive:
        V &= units > 0
    V = V.view(score.shape)
    return V if out is None else out.copy_(V)


def row_step(
    state: RowState,
    *,
    eta: float | Tensor | None = None,
    theta: float | Tensor = 0.0,
    next_theta: float | Tensor = 0.0,
) -> None:
    """One Frank-Wolfe step of every row, in place: step size, convex update, next vertex, weights that it removes.

        D    = V - M                                    q = W^2 diag
        lin  = sum(D * (-2 W R + theta q (1 - 2 M)))    quad = sum(W D (R - U)) - theta sum(q D^2)
        eta  = clip(-lin / (2 quad), 0, 1)              where quad <= 0: the better of 0 and 1
        M   += eta D                                    R   += eta (U - R)
        V    = lmo(2 W R - next_theta q (1 - 2 M))      E    = target_gap + W * (1 - V)

    While next_theta < 1 the vertex takes only positive scores; from then on it keeps exactly k entries.
    """
    w, M, R, U, V = widened(state.W), state.M, state.R, state.U, state.V.to(state.M.dtype)
    q, D = w**2 * state.diag, V - M
    if eta is None:
        lin = (D * (-2 * w * R + theta * q * (1 - 2 * M))).sum(1)
        quad = (w * D * (R - U)).sum(1) - theta * (q * D**2).sum(1)
        state.eta.copy_(torch.where(quad > 0, (-lin / (2 * quad)).clamp(0, 1), lin + quad < 0))
    else:
        state.eta[:] = eta
    M += state.eta[:, None] * D
    R += state.eta[:, None] * (U - R)
    state.error.copy_((w * (1 - M) * R).sum(1))
    score = 2 * w * R - next_theta * q * (1 - 2 * M)
    choice = dict(group=state.group, fixed=state.fixed, positive=bool(next_theta < 1))
    lmo(score, state.k, **choice, check_nan=False, out=state.V)
    removed = w.masked_fill(state.V, 0)
    state.E.copy_(removed if state.target_gap is None else state.target_gap + removed)


def row_swaps(
    W: Tensor, G: Tensor, R: Tensor, V: Tensor, limit: int, *, group: int = 0, fixed: Tensor | None = None
) -> None:
    """Lower the error of every row's binary mask V by 1-swaps, in place, until none is left or `limit` are made.

    Removing the kept entry i and keeping the removed entry p changes a row's error by exactly

        a_i + b_p - 2 W_i W_p G_ip,     a = q + 2 W R,     b = q - 2 W R,     q = W^2 diag(G)

    and R by W_i G_i - W_p G_p, without a product. The search looks only at pairs that hold the lowest a or the lowest b
    of their row (or group), and makes the best of these swaps. Ties go to the lower index.
    """
    never = torch.zeros_like(V) if fixed is None else fixed
    for w, r, v, kept in zip(widened(W), R, V, never, strict=True):
        q = w**2 * G.diagonal()
        least = LEAST_GAIN * q[~v].sum()
        for _ in range(limit):
            a = (q + 2 * w * r).masked_fill(~v | kept, torch.inf)
            b = (q - 2 * w * r).masked_fill(v, torch.inf)
            groups = torch.arange(len(w), device=w.device).split(group or len(w))
            change, i, p = min(_best_swap(w, G, a, b, members) for members in groups)
            if not change < -least:
                break
            v[i], v[p] = False, True
            r += w[i] * G[i] - w[p] * G[p]


def _best_swap(w: Tensor, G: Tensor, a: Tensor, b: Tensor, members: Tensor) -> tuple[float, int, int]:
    """The best swap (i, p) among the columns `members` of a row; the change of the error comes first."""
    i, p = members[a[members].argmin()], members[b[members].argmin()]
    # The pairs (i, any) and (any, p).
    with_i = a[i] + b[members] - 2 * w[i] * w[members] * G[i, members]
    with_p = a[members] + b[p] - 2 * w[members] * w[p] * G[members, p]
    if with_p.min() < with_i.min():
        return with_p.min().item(), int(members[with_p.argmin()]), int(p)
    return with_i.min().item(), int(i), int(members[with_i.argmin()])


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


def take_rows(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """X[taken] = Y[taken], in place."""
    X[taken] = Y[taken]


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


def round_mask(M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
    """The binary mask of the k highest M of every row (or group), (rows, d) bool.

    Exactly k entries are kept. Ties go to the higher saliency, then to the lower index.
    """
    units = (-1, group or M.shape[1])
    first = lmo(M, k, group=group)
    # The lowest M that got in. Entries above it are kept; saliency decides among those equal to it.
    lowest = M.masked_fill(~first, torch.inf).view(units).amin(1, keepdim=True)
    order = torch.sign(M.view(units) - lowest).view(M.shape)
    return lmo(order * torch.finfo(torch.float32).max + saliency, k, group=group)


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
    """One step of preconditioned conjugate gradients of every row, in place: the move along P, and the next P.

        a  = rz / <P, U>                             0 where a row is done, rz <= enough
        Z += a P                                     R -= a U
        r  = mask * R     z = r inverse              rz' = <r, z>
        P  = z + (rz' / rz) P

    A ratio whose denominator is not positive is 0: nothing is left to gain in that row.
    """
    p, before = P.to(Z.dtype), rz.clone()
    if not first:
        a = ratio(before, (p * U).sum(1)).masked_fill(before <= enough, 0)[:, None]
        Z += a * p
        R -= a * U
    if last:
        return
    r = R if mask is None else R.masked_fill(~mask, 0)
    z = r * inverse
    rz.copy_((r * z).sum(1))
    if first:
        P.copy_(z)
        enough.copy_(CONVERGED * rz)
    else:
        P.copy_(z + ratio(rz, before)[:, None] * p)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, 0)


def adam_step(
    W: Tensor, gradient: Tensor, index: Tensor, weight: Tensor, m: Tensor, v: Tensor, *, rate: float, step: int
) -> None:
    """A step of Adam (arXiv 1412.6980) of the entries of W at `index`: m, v and the entries are kept unrounded."""
    (beta, gamma), g = definitions.DECAYS, gradient[index.long()].to(m.dtype)
    m.copy_(beta * m + (1 - beta) * g)
    v.copy_(gamma * v + (1 - gamma) * g**2)
    weight -= rate * (m / (1 - beta**step)) / ((v / (1 - gamma**step)).sqrt() + definitions.ADAM_EPSILON)
    W[index.long()] = weight.to(W.dtype)
