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
from sparsefw.kernels.definitions import CONVERGED, LEAST_GAIN, RowState, check_budget, check_precision
from sparsefw.kernels.operation import OPERATIONS


def __getattr__(name: str) -> Callable:
    """The reference of an operation, which lies beside its kernel."""
    if name not in OPERATIONS:
        raise AttributeError(name)
    return OPERATIONS[name].reference


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


def take_rows(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """X[taken] = Y[taken], in place."""
    X[taken] = Y[taken]


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
