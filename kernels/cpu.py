"""The operations of a Frank-Wolfe iteration in plain torch: the specification of every kernel beside it.

`--kernel torch` runs this file, the tests compare with it and the benchmarks race it. The Triton files define the
same names with the same signatures. Words and symbols (`src` is any tensor named below):

    W (rows, d)   weight, fp32 / bf16 / fp16        G (d, d)      Gram matrix X^T X of the inputs, fp32
    M (rows, d)   relaxed mask in [0, 1], fp32       V (rows, d)   vertex, a binary mask, bool
    E (rows, d)   what a mask removes, W * (1 - V)   diag (d,)     diagonal of G, fp32
    lacks (rows, d)  where masked weights approximate others, those minus W, fp32: E and the products have it too
    R (rows, d)   (W * (1 - M)) G, fp32              U (rows, d)   (W * (1 - V)) G, fp32
    fixed (rows, d)  bool, entries every vertex must keep
    error(M) = sum(W * (1 - M) * R), one quadratic per row
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .topk_torch import as_float, infinite, keep, row_blocks, select

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")

# A row of conjugate gradients is done once <r, z> has fallen to this share of its start: from there on its ratios are
# rounding errors.
CONVERGED = 1e-12

# A swap counts only if it lowers the row's error by this fraction of sum(q) over what is removed at the start: less may
# be rounding, and a search that follows rounding need not end.
LEAST_GAIN = 1e-6


def round_operand(X: Tensor, precision: str) -> Tensor:
    """X in fp32, rounded to what the tensor cores read at `precision`.

    Args:
        X: any floating tensor.
        precision: "ieee" (fp32, nothing lost), "tf32x3" (the sum of two tf32 numbers), "tf32" (10 explicit mantissa
            bits) or "bf16" (7 bits).

    Raises:
        ValueError: for any other precision.
    """
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


def product(E: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None) -> Tensor:
    """E G with fp32 accumulation, the one matrix product of an iteration.

    Args:
        E: (rows, d), fp32 / bf16 / fp16.
        G: (d, d), symmetric, fp32 or bf16.
        precision: of both operands, see `round_operand`.
        out: (rows, d) fp32, written and returned; allocated when None.
    """
    return torch.mm(round_operand(E, precision), round_operand(G, precision), out=out)


def gradient(W: Tensor, M: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None) -> Tensor:
    """Gradient of error(M) with respect to M: -2 W * ((W * (1 - M)) G), (rows, d) fp32.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        M: (rows, d), fp32 in [0, 1].
        G: (d, d), symmetric, fp32 or bf16.
        precision: of both operands of the product, see `round_operand`.
        out: (rows, d) fp32, written and returned; allocated when None.
    """
    W = W.float()
    out = product(W * (1 - M), G, precision=precision, out=out)
    return out.mul_(W).mul_(-2)


def gram_accumulate(G: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """G += X^T X in place, fp32 accumulation; G stays exactly symmetric.

    Args:
        G: (d, d) fp32, symmetric.
        X: (tokens, d), fp32 / bf16 / fp16. bf16 and fp16 products are exact in fp32 whatever `precision`.
        precision: of fp32 operands, "ieee" or "tf32".
    """
    X = round_operand(X, precision)
    return G.addmm_(X.T, X)


def cross_accumulate(B: Tensor, D: Tensor, X: Tensor, *, precision: str = "ieee") -> Tensor:
    """B += D^T X in place, fp32 accumulation: how what a layer's output lacks goes with its input.

    Args:
        B: (rows, d) fp32, the cross matrix.
        D: (tokens, rows), dtype of X: the output that there should be, minus the one that there is.
        X: (tokens, d), fp32 / bf16 / fp16, the input.
        precision: as in `gram_accumulate`, of both operands.
    """
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
    """Linear minimization oracle: the vertex that keeps the k best scores of every row, (rows, d) bool.

    Exactly k are kept (fewer only under `positive`); equal scores go to the lower index.

    Args:
        score: (rows, d) fp32, the negative gradient. +inf and -inf are scores like others.
        k: kept per row, one int or an int tensor (rows,); with `group`, kept per group, an int.
        group: 0 for whole rows, else m of n:m: every m consecutive entries of a row keep k of their own.
        fixed: (rows, d) bool, kept whatever their score; at most k in a row (or group).
        positive: keep only scores above 0 (and the fixed entries): less than k where a row has fewer.
        checked: whether to look for NaN, which waits for the GPU. A caller who does not has to find it by other means:
            the choice of a row that has one is undefined.
        out: (rows, d) bool, written and returned; allocated when None.

    Raises:
        ValueError: k out of range, d not a multiple of `group`, or a NaN among the scores that are checked.
    """
    check_budget(score.shape, k, group)
    # The maximum of a row is NaN where one of its entries is.
    if checked and score.numel() and score.amax(1).isnan().any():
        raise ValueError("score: NaN is no choice")
    out = torch.empty(score.shape, dtype=torch.bool, device=score.device) if out is None else out
    return select(score, k, group=group, fixed=fixed, positive=positive, out=out)


def check_budget(shape: torch.Size, k: int | Tensor, group: int) -> None:
    """Raise ValueError unless k of every row (or of every `group` consecutive entries) can be kept."""
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
    lacks: Tensor | None = None,
    eta: float | Tensor | None = None,
    theta: float | Tensor = 0.0,
    next_theta: float | Tensor = 0.0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One Frank-Wolfe step of every row, in place: step size, convex update, next vertex, what it removes.

        D    = V - M                                    q = W^2 diag
        lin  = sum(D * (-2 W R + theta q (1 - 2 M)))    quad = sum(W D (R - U)) - theta sum(q D^2)
        eta  = clip(-lin / (2 quad), 0, 1)              where quad <= 0: the better of 0 and 1
        M   += eta D                                    R   += eta (U - R)
        V    = lmo(2 W R - next_theta q (1 - 2 M))      E    = lacks + W * (1 - V)

    Only positive scores are taken while next_theta < 1; from then on exactly k are.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        diag: (d,) fp32, the diagonal of G.
        M, R: (rows, d) fp32, the state; updated.
        U: (rows, d) fp32, the product of E; its content is undefined afterwards.
        V: (rows, d) bool, the vertex that U belongs to; replaced by the next one.
        E: (rows, d), dtype of the product's operand; replaced.
        k, group, fixed: as in `lmo`.
        lacks: (rows, d) fp32, added to what V removes; None adds nothing.
        eta: step size for all rows (open loop); None for the line search above. This and the next two are numbers, or
            tensors () fp32, read when the step runs: see `repeat`.
        theta: weight of the integrality penalty that V was chosen with, 0 to 1.
        next_theta: the one that the next V is chosen with.
        out: two of (rows,) fp32, written and returned; allocated when None.

    Returns:
        eta (rows,) and the relaxed error (rows,) after the update, fp32. A NaN in the state shows in the error.
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
        # Half of the score, in the place of U: what is selected is the same.
        score = torch.mul(w, r, out=u)
        removed = 1 - m
        error[rows] = (score * removed).sum(1)
        if next_theta:
            score.addcmul_(removed.sub_(0.5), q, value=-next_theta)
        budget = k[rows] if isinstance(k, Tensor) else k
        held = None if fixed is None else fixed[rows]
        select(score, budget, group=group, fixed=held, positive=next_theta < 1, out=v)
        removed = torch.mul(w, as_float(~v), out=removed)
        E[rows] = removed if lacks is None else removed.add_(lacks[rows])
    return step, error


def _line_search(w: Tensor, q: Tensor | None, m: Tensor, r: Tensor, D: Tensor, B: Tensor, theta: float) -> Tensor:
    """The step sizes (rows,), with D = V - M and B = U - R."""
    wD = w * D
    # Half of -lin, in few calls: those on a number per row take as long as their arithmetic on a whole row.
    half, quad = (wD * r).sum(1), wD.mul_(B).sum(1).neg_()
    if theta:
        qD = torch.mul(q, D, out=wD)
        half.add_((m - 0.5).mul_(qD).sum(1), alpha=theta)
        quad.sub_(qD.mul_(D).sum(1), alpha=theta)
    return torch.where(quad > 0, (half / quad).clamp_(0, 1), quad < 2 * half)


def repeat(step: Callable[..., object], numbers: Sequence[Sequence[float]], like: Tensor) -> Iterator[None]:
    """Run step(*row) for every row of `numbers`; yields after each.

    Args:
        step: launches the same operations on the same tensors every time, whatever its numbers are.
        numbers: (runs, n), what differs from run to run.
        like: a tensor on the device where it all happens.
    """
    for row in numbers:
        step(*row)
        yield


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

    A ratio is 0 where its denominator is not positive: nothing is left to gain in that row.

    Args:
        Z: (rows, d) fp32, what moves.
        R: (rows, d) fp32, its residual, B - Z G.
        P: (rows, d), fp32 or the type that the product reads, the direction; replaced by the next one.
        U: (rows, d) fp32, the product P G.
        rz: (rows,) fp32, <r, z> of the direction; replaced.
        enough: (rows,) fp32, the <r, z> at which a row is done.
        inverse: (d,) fp32, the preconditioner: 1 / diag(G).
        mask: (rows, d) bool, the entries that move; None moves all.
        first: nothing moves yet; P, rz and enough are only written, and U is not used.
        last: P and rz are of no use afterwards, and left alone.
    """
    for rows in row_blocks(Z):
        r, p = R[rows], P[rows].float()
        if not first:
            u, before = U[rows], rz[rows]
            a = _ratio(before, (p * u).sum(1)).masked_fill_(before <= enough[rows], 0)[:, None]
            Z[rows].addcmul_(p, a)
            r.addcmul_(u, -a)
        if last:
            continue
        r = r if mask is None else keep(r, mask[rows])
        z = r * inverse
        now = (r * z).sum(1)
        if first:
            p.copy_(z)
            enough[rows] = CONVERGED * now
        else:
            p.mul_(_ratio(now, before)[:, None]).add_(z)
        if p.dtype != P.dtype:
            P[rows] = p
        rz[rows] = now


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0)


def row_swaps(
    W: Tensor, G: Tensor, R: Tensor, V: Tensor, limit: int, *, group: int = 0, fixed: Tensor | None = None
) -> None:
    """Lower the error of every row's binary mask V by 1-swaps, in place, until none is left or `limit` are made.

    Removing the kept i and keeping the removed p changes a row's error by exactly

        a_i + b_p - 2 W_i W_p G_ip,     a = q + 2 W R,     b = q - 2 W R,     q = W^2 diag(G)

    and R by W_i G_i - W_p G_p: no product. Of all pairs only those are searched that hold the best a (of every group)
    or the best b; the best of these is swapped.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        G: (d, d) fp32, symmetric.
        R: (rows, d) fp32, the product of what V removes and, where W approximates others, of what it lacks; updated.
        V: (rows, d) bool; updated. No row (or group) comes to keep more or less.
        limit: swaps per row at most.
        group: m of n:m, whose swaps stay within a group; else 0.
        fixed: (rows, d) bool, kept whatever their a.
    """
    W = W.float()
    blocks = _diagonal_blocks(G, group or G.shape[1])
    q = W * W * G.diagonal()
    least = keep(q, ~V).sum(1).mul_(-LEAST_GAIN)
    rows, r, v = torch.arange(len(W), device=W.device), R.clone(), V.clone()
    held = V.new_zeros(()) if fixed is None else fixed
    for _ in range(limit):
        lin = (2 * W).mul_(r)
        a, b = torch.maximum(q + lin, infinite(~v | held)), torch.maximum(q - lin, infinite(v))
        i, p, change = _best_swap(W, a, b, blocks)
        go = change < least
        if not go.all():
            # Rows without a swap are done.
            R[rows], V[rows] = r, v
            W, q, least, rows, r, v, i, p = (x[go] for x in (W, q, least, rows, r, v, i, p))
            held = held if fixed is None else held[go]
        if not len(rows):
            return
        at = torch.arange(len(rows), device=W.device)
        v[at, i], v[at, p] = False, True
        r += G[i] * W[at, i, None] - G[p] * W[at, p, None]
    R[rows], V[rows] = r, v


def _diagonal_blocks(G: Tensor, m: int) -> Tensor:
    """The blocks of G within groups of m, (d / m, m, m); a view where there is one group."""
    groups = len(G) // m if m else 1
    return G.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _best_swap(W: Tensor, a: Tensor, b: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row the pair (i, p) to swap and what the swap changes; a and b (rows, d) are inf where there is none."""
    groups, m, _ = blocks.shape
    shape = (len(W), groups, m)
    w, a, b = W.view(shape), a.view(shape), b.view(shape)
    group = torch.arange(groups, device=W.device)

    def partners(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The best x of every group, and its best partner in y.
        first = x.argmin(2, keepdim=True)
        pairs = blocks[group, first.squeeze(2)].mul_(w).mul_(2 * w.gather(2, first))
        change, second = (y - pairs).min(2, keepdim=True)
        change += x.gather(2, first)
        change, best = change.min(1, keepdim=True)
        return *((z.gather(1, best) + m * best).view(-1) for z in (first, second)), change.view(-1)

    i, p, change = partners(a, b)
    p_too, i_too, change_too = partners(b, a)
    better = change_too < change
    return torch.where(better, i_too, i), torch.where(better, p_too, p), torch.minimum(change, change_too)
