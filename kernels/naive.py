"""The specification: every operation in plain torch, formula by formula.

Tests hold both backends against it: cpu.py (`--kernel torch`) and triton_ops.py (`--kernel triton`) define the same
names with the same signatures. Nothing here is meant to be fast. Given float64 tensors an operation computes in
float64, so that tests can take it for the truth; else it computes in fp32.

    W (rows, d)           weight                             G (d, d)     Gram matrix X^T X of the inputs
    M (rows, d)           relaxed mask, entries in [0, 1]    diag (d,)    diagonal of G
    V (rows, d)           vertex: a binary mask, bool        fixed (rows, d)    bool, entries that every vertex keeps
    target_gap (rows, d)  target minus W, where the masked weights approximate a target other than W; else None
    E (rows, d)           weights that V removes, W * (1 - V), plus the target gap
    R (rows, d)           (W * (1 - M)) G, plus the target gap's product
    U (rows, d)           E G, the same product for V
    error(M) = sum(W * (1 - M) * R), one quadratic per row
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")

# A swap is made only if it lowers the row's error by more than this fraction of sum(q) over the entries removed at the
# start. A smaller gain may be rounding, and a search that follows rounding may never end.
LEAST_GAIN = 1e-6


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
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
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


def gradient(W: Tensor, M: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None) -> Tensor:
    """Gradient of error(M) with respect to M: -2 W * ((W * (1 - M)) G), (rows, d) fp32.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        M: (rows, d), fp32 in [0, 1].
        G: (d, d), symmetric, fp32 or bf16.
        precision: rounding of both operands of the product, see `round_operand`.
        out: (rows, d) fp32, written and returned; allocated when None.
    """
    W = widened(W)
    slope = -2 * W * product(W * (1 - M), G, precision=precision)
    return slope if out is None else out.copy_(slope)


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


def check_budget(shape: torch.Size, k: int | Tensor, group: int) -> None:
    """Raise ValueError unless k entries of every row (or of every `group` consecutive entries) can be kept."""
    rows, d = shape
    if group < 0 or (group and d % group):
        raise ValueError(f"group: expected a divisor of d = {d}, got {group}")
    width = group or d
    if isinstance(k, Tensor):
        if group or k.shape != (rows,) or k.is_floating_point():
            raise ValueError(f"k: expected an int, or {rows} integers where group is 0, got {tuple(k.shape)} {k.dtype}")
    elif not 0 <= k <= width:
        raise ValueError(f"k: expected 0 to {width}, got {k}")


def convex_update(M: Tensor, V: Tensor, R: Tensor, U: Tensor, eta: Tensor) -> None:
    """M += eta (V - M) and R += eta (U - R), in place, with one step size per row.

    Args:
        M, R, U: (rows, d) fp32.
        V: (rows, d) bool.
        eta: (rows,) fp32 in [0, 1].
    """
    eta = eta[:, None]
    M += eta * (V.to(M.dtype) - M)
    R += eta * (U - R)


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
    """One Frank-Wolfe step of every row, in place: step size, convex update, next vertex, weights that it removes.

        D    = V - M                                    q = W^2 diag
        lin  = sum(D * (-2 W R + theta q (1 - 2 M)))    quad = sum(W D (R - U)) - theta sum(q D^2)
        eta  = clip(-lin / (2 quad), 0, 1)              where quad <= 0: the better of 0 and 1
        M   += eta D                                    R   += eta (U - R)
        V    = lmo(2 W R - next_theta q (1 - 2 M))      E    = target_gap + W * (1 - V)

    While next_theta < 1 the vertex takes only positive scores; from then on it keeps exactly k entries.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        diag: (d,) fp32, the diagonal of G.
        M, R: (rows, d) fp32, the state; updated.
        U: (rows, d) fp32, the product of E; its content is undefined afterwards.
        V: (rows, d) bool, the vertex that U belongs to; replaced by the next one.
        E: (rows, d), dtype of the product's operand; replaced.
        k, group, fixed: as in `lmo`.
        target_gap: (rows, d) fp32, added to the removed weights; None adds nothing.
        eta: step size for all rows (open loop); None for the line search above. `eta`, `theta` and `next_theta` are
            numbers, or tensors () fp32 that are read when the step runs: see `repeat`.
        theta: weight of the integrality penalty that V was chosen with, 0 to 1.
        next_theta: weight of the penalty that the next V is chosen with.
        threshold: (rows,) fp32, a score per row near which a search for the next vertex may start; replaced by one that
            is right for this step where a search starts from it. It changes no result.
        out: two tensors (rows,) fp32, written and returned; allocated when None.

    Returns:
        eta (rows,) and error(M) (rows,) after the update, fp32. A NaN in the state shows in the error.
    """
    w, v = widened(W), V.to(M.dtype)
    q, D = w**2 * diag, v - M
    step, error = out or M.new_empty(2, len(M)).unbind()
    if eta is None:
        lin = (D * (-2 * w * R + theta * q * (1 - 2 * M))).sum(1)
        quad = (w * D * (R - U)).sum(1) - theta * (q * D**2).sum(1)
        step.copy_(torch.where(quad > 0, (-lin / (2 * quad)).clamp(0, 1), lin + quad < 0))
    else:
        step[:] = eta
    convex_update(M, V, R, U, step)
    error.copy_((w * (1 - M) * R).sum(1))
    score = 2 * w * R - next_theta * q * (1 - 2 * M)
    lmo(score, k, group=group, fixed=fixed, positive=bool(next_theta < 1), checked=False, out=V)
    removed = w.masked_fill(V, 0)
    E.copy_(removed if target_gap is None else target_gap + removed)
    return step, error


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
