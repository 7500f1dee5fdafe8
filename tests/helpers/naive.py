"""The specification of the kernels: every operation in plain torch, formula by formula.

Tests hold both implementations against it: cpu.py (`--kernel torch`) and triton_ops.py (`--kernel triton`) define the
same names with the same signatures. Nothing here is meant to be fast. Given float64 tensors an operation computes in
float64, so that tests can take it for the truth; else it computes in fp32. `kernels/definitions.py` has the notation.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparsefw.kernels.definitions import CONVERGED, LEAST_GAIN, RowState, check_budget, check_precision


def round_operand(X: Tensor, precision: str) -> Tensor:
    """X rounded to the numbers that tensor cores read at `precision`.

    Args:
        X: any floating tensor.
        precision: "ieee" (fp32, no rounding), "tf32" (10 explicit mantissa bits, to nearest even; a GPU may cut the
            others off), "tf32x3" (the sum of two tf32 numbers: X rounded, and the rounded rest) or "bf16" (7 explicit
            mantissa bits).

    Returns:
        The rounded numbers in float64 if X is float64, else in fp32.

    Raises:
        ValueError: for any other precision.
    """
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
    """E G, the one matrix product of an iteration, accumulated in fp32.

    Args:
        E: (rows, d), fp32 / bf16 / fp16.
        G: (d, d), symmetric, fp32 or bf16.
        precision: rounding of both operands, see `round_operand`.
        out: (rows, d) fp32, written and returned; allocated when None.
        add: add the product to what `out` holds.
    """
    EG = round_operand(E, precision) @ round_operand(G, precision)
    if add:
        assert out is not None
        return out.add_(EG)
    return EG if out is None else out.copy_(EG)


def product_transposed(E: Tensor, C: Tensor, *, precision: str = "ieee") -> Tensor:
    """E C^T, (rows, d) fp32, for a matrix that need not be symmetric.

    Args:
        E: (rows, d), fp32 / bf16 / fp16.
        C: (d, d), fp32 or bf16.
        precision: rounding of both operands, see `round_operand`.
    """
    return product(E, C.T, precision=precision)


def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """Lower triangle of G += X^T X in place, accumulated in fp32. `mirror_lower` completes G after the last call.

    Args:
        G: (d, d) fp32. What stands above its diagonal is not read, and is undefined afterwards.
        X: (tokens, d), fp32 / bf16 / fp16. Products of two bf16 or two fp16 numbers are exact at any precision.
        precision: rounding of fp32 inputs, "ieee" or "tf32".

    Returns:
        G.
    """
    X = round_operand(X, precision)
    return G.add_(X.T @ X)


def mirror_lower(G: Tensor) -> Tensor:
    """Copy the lower triangle of G to the upper one, in place, so that G is exactly symmetric.

    Args:
        G: (d, d) fp32. What stands above its diagonal is not read.

    Returns:
        G.
    """
    return G.copy_(G.tril() + G.tril(-1).T)


def cross_accumulate(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """B += D^T X in place, accumulated in fp32: correlates a layer's output error with its input.

    Args:
        B: (rows, d) fp32, the cross matrix.
        D: (tokens, rows), dtype of X: the desired output minus the actual output.
        X: (tokens, d), fp32 / bf16 / fp16, the input.
        precision: rounding of fp32 operands, "ieee" or "tf32".

    Returns:
        B.
    """
    return B.add_(round_operand(D, precision).T @ round_operand(X, precision))


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
    """Linear minimization oracle: the vertex that keeps the k best scores of every row, (rows, d) bool.

    Exactly k entries are kept (fewer only under `positive`). Equal scores go to the lower index; -0 equals +0.

    Args:
        score: (rows, d) fp32, the negative gradient. +inf and -inf are scores like others.
        k: entries kept per row, an int or an int tensor (rows,); with `group`, entries kept per group, an int.
        group: 0 for whole rows, else m of n:m: every m consecutive entries of a row keep k of their own.
        fixed: (rows, d) bool, entries whose score counts as +inf; at most k in a row (or group).
        positive: keep only scores above 0. A row (or group) that has fewer than k of them keeps fewer.
        checked: whether to look for NaN, which waits for the GPU. A caller that passes False has to find a NaN by other
            means: the choice in a row with a NaN is undefined.
        out: (rows, d) bool, written and returned; allocated when None.

    Raises:
        ValueError: k out of range, d not a multiple of `group`, or a NaN among checked scores.
    """
    check_budget(score.shape, k, group)
    if checked and score.isnan().any():
        raise ValueError("score: NaN is no choice")
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

    Args:
        state: changed in place.
        eta: step size for all rows (open loop); None for the line search above. `eta`, `theta` and `next_theta` are
            numbers, or tensors () fp32 that are read when the step runs: see `repeat`.
        theta: weight of the integrality penalty that V was chosen with, 0 to 1.
        next_theta: weight of the penalty that the next V is chosen with.
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
    lmo(score, state.k, **choice, checked=False, out=state.V)
    removed = w.masked_fill(state.V, 0)
    state.E.copy_(removed if state.target_gap is None else state.target_gap + removed)


def repeat(step: Callable[..., object], numbers: Sequence[Sequence[float]], like: Tensor) -> Iterator[None]:
    """Run step(*row) for every row of `numbers`; yields after each.

    Args:
        step: launches the same operations on the same tensors every time, whatever its numbers are.
        numbers: (runs, n), the numbers of every run.
        like: a tensor on the device where the step runs.
    """
    for row in numbers:
        step(*row)
        yield


def row_swaps(
    W: Tensor, G: Tensor, R: Tensor, V: Tensor, limit: int, *, group: int = 0, fixed: Tensor | None = None
) -> None:
    """Lower the error of every row's binary mask V by 1-swaps, in place, until none is left or `limit` are made.

    Removing the kept entry i and keeping the removed entry p changes a row's error by exactly

        a_i + b_p - 2 W_i W_p G_ip,     a = q + 2 W R,     b = q - 2 W R,     q = W^2 diag(G)

    and R by W_i G_i - W_p G_p, without a product. The search looks only at pairs that hold the lowest a or the lowest b
    of their row (or group), and makes the best of these swaps. Ties go to the lower index.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        G: (d, d) fp32, symmetric.
        R: (rows, d) fp32, the product E G of the removed weights plus the target gap; updated.
        V: (rows, d) bool; updated. Every row (or group) keeps as many entries as before.
        limit: swaps per row at most.
        group: m of n:m, whose swaps stay within a group; else 0.
        fixed: (rows, d) bool, entries that are never removed.
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
    """E = target_gap + W * (1 - mask), the weights that a mask removes, as the left operand of a product.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        mask: (rows, d) bool, True keeps a weight.
        target_gap: (rows, d) fp32, the target minus W; None adds nothing.
        out: (rows, d), fp32 / bf16 / fp16, written and returned. When None it is allocated, in the dtype of W, or with
            a target gap in fp32.
    """
    E = W.masked_fill(mask, 0)
    E = E if target_gap is None else target_gap + E
    return E if out is None else out.copy_(E)


def begin_fit(W: Tensor, start: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The start of a refit: Z = mask * start, and E = W - Z, the left operand of the product that gives the residual.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        start: (rows, d), fp32 / bf16 / fp16; entries outside the mask are not read.
        mask: (rows, d) bool.
        dtype: the dtype of E, fp32 or bf16.

    Returns:
        Z (rows, d) fp32, and E (rows, d).
    """
    Z = widened(start).masked_fill(~mask, 0)
    E = widened(W) - Z
    return Z, E if E.dtype == torch.float64 else E.to(dtype)


def row_errors(W: Tensor, R: Tensor, Z: Tensor | None = None) -> Tensor:
    """sum((W - Z) * R) of every row, (rows,) fp32: the error of weights Z that approximate W, if R = (W - Z) G.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        R: (rows, d) fp32.
        Z: (rows, d), fp32 / bf16 / fp16; None subtracts nothing.
    """
    E = widened(W) if Z is None else widened(W) - widened(Z)
    return (E * R).sum(1)


def take_rows(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """X[taken] = Y[taken], in place.

    Args:
        X, Y: (rows, d), of one dtype.
        taken: (rows,) bool.
    """
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

    Args:
        Z: (rows, d) fp32, refitted weights, 0 outside the mask.
        R: (rows, d) fp32, (W - Z) G.
        mask: (rows, d) bool, the weights that are kept.
        inverse: (d,) fp32, 1 / diag(G).
        root: (d,) fp32, the square roots of diag(G).
        margin: (rows,) fp32, by which a removed weight has to be better than a kept one; None: 0.
        support: (rows, d) bool, weights that may be nonzero; None: all.

    Returns:
        T and score, (rows, d) fp32 each.
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

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        R: (rows, d) fp32, (target_gap + W * (1 - M)) G, on G with `damping` added to its diagonal.
        M: (rows, d) fp32, the relaxed mask.
        target_gap: (rows, d) fp32, the target minus W; None if they are the same.
        damping: (d,) fp32; None: 0.

    Returns:
        score (rows, d) fp32, and constant (rows,) fp32.
    """
    w, r = widened(W), R
    if damping is not None:
        E = w * (1 - M)
        r = R - (E if target_gap is None else target_gap + E) * damping
    return w * r, r.new_zeros(len(r)) if target_gap is None else (target_gap * r).sum(1)


def bound_sums(score: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """sum(score * (1 + M - 2 V)) of every row, (rows,) fp32: error(M) - <gradient, M - V>, without the target gap.

    Args:
        score: (rows, d) fp32, from `bound_scores`.
        M: (rows, d) fp32, the relaxed mask.
        V: (rows, d) bool, the vertex of the score.
    """
    return (score * (1 + M - 2 * V.to(M.dtype))).sum(1)


def round_mask(M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
    """The binary mask of the k highest M of every row (or group), (rows, d) bool.

    Exactly k entries are kept. Ties go to the higher saliency, then to the lower index.

    Args:
        M: (rows, d) fp32, the relaxed mask.
        saliency: (rows, d) fp32, at least 0.
        k, group: as in `lmo`.
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

    Args:
        Z: (rows, d) fp32, the iterate.
        R: (rows, d) fp32, its residual, B - Z G.
        P: (rows, d), fp32 or the dtype of the product's operand, the direction; replaced by the next one.
        U: (rows, d) fp32, the product P G.
        rz: (rows,) fp32, <r, z> of the direction; replaced.
        enough: (rows,) fp32, the <r, z> at which a row is done.
        inverse: (d,) fp32, the preconditioner: 1 / diag(G).
        mask: (rows, d) bool, the entries that move; None moves all.
        first: before the first move. P, rz and enough are only written, Z and R stay, U is not read.
        last: after the last product. Z and R move; P, rz and enough stay.
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
