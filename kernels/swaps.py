"""row_swaps: make 1-swaps of every row's mask, in place, each the best of the pairs that hold the lowest a or b.

    a = q + 2 W R of kept entries      b = q - 2 W R of removed entries      q = W^2 diag(G)
    remove i, keep p:  change = a_i + b_p - 2 W_i W_p G_ip      R += W_i G_i - W_p G_p      V_i = 0, V_p = 1

    W (rows, d)     G (d, d) fp32     R (rows, d) fp32     V, fixed (rows, d) bool

A swap takes three passes over the row, which stays in the cache. The first finds the lowest a and the lowest b, the
second finds the best partner of each, and the third updates R. With n:m one pass over whole groups replaces the first
two. A program has one row and ends with its search, so no row waits for a longer search. Sums and state are in fp32.
Ties go to the lower index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .definitions import LEAST_GAIN, widened
from .device import columns, load, store
from .launch import (
    BOOL,
    FLOATS,
    FP32,
    check_matrix,
    check_rows,
    interpreter_tile,
    launch_rows,
    platform,
    row_strides,
    warps,
)
from .lmo import check_selection, padded_d
from .lmo import reference as best_vertex
from .operation import ALL, Arguments, Cost, Size, launch, metadata, operation


def reference(
    W: Tensor, G: Tensor, R: Tensor, V: Tensor, limit: int, *, group: int = 0, fixed: Tensor | None = None
) -> None:
    """Compute the operation in plain torch.

    The search looks only at pairs that hold the lowest a or the lowest b of their row (or group).
    """
    w, size, column = widened(W), group or W.shape[1], torch.arange(W.shape[1], device=W.device)
    q = w**2 * G.diagonal()
    least = LEAST_GAIN * (q * ~V).sum(1, keepdim=True)

    def best_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # For every y, the column of the lowest x of its group.
        lowest = x.view(len(x), -1, size).argmin(2).repeat_interleave(size, 1) + column // size * size
        changes = x.gather(1, lowest) + y - 2 * w.gather(1, lowest) * w * G[lowest, column]
        change, at = changes.min(1, keepdim=True)
        return change, lowest.gather(1, at), at

    for _ in range(limit):
        a = (q + 2 * w * R).masked_fill(~V if fixed is None else ~V | fixed, torch.inf)
        b = (q - 2 * w * R).masked_fill(V, torch.inf)
        (change, i, p), (change_b, p_b, i_b) = best_pair(a, b), best_pair(b, a)
        i, p = torch.where(change_b < change, i_b, i), torch.where(change_b < change, p_b, p)
        made = torch.minimum(change, change_b) < -least
        V.scatter_(1, i, V.gather(1, i) & ~made).scatter_(1, p, V.gather(1, p) | made)
        R += made * (w.gather(1, i) * G[i[:, 0]] - w.gather(1, p) * G[p[:, 0]])


def cost(W: Tensor, limit: int, group: int = 0, fixed: Tensor | None = None) -> Cost:
    """Read W, R, V and `fixed`, write R and V, and read rows of G for each of `limit` swaps of every row.

    A swap reads the two rows that it adds to R. Without groups it also reads one in its search. A large G is in no
    cache, so each of these rows counts.
    """
    of_swap = 4 * (2 if group else 3)
    return Cost(30 * limit * W.numel(), W.numel() * (W.itemsize + 10 + (fixed is not None) + of_swap * limit))


def example(size: Size, *, group: int = 0, fixed: bool = False) -> Arguments:
    """Start from the mask of Wanda, in which every row has enough swaps to make."""
    W, G = size.weight(), size.gram()
    k = group // 2 or int(0.4 * size.d)
    V = best_vertex(W.float().abs() * G.diagonal().sqrt(), k, group=group, check_nan=False)
    R = W.float().masked_fill(V, 0) @ G
    return dict(W=W, G=G, R=R, V=V, limit=10, group=group, fixed=V & size.mask(seed=1) if fixed else None)


def configuration(rows: int, d: int, group: int) -> dict[str, int]:
    """Choose tile sizes and launch options. On a GPU a program has one row."""
    width = triton.next_power_of_2(padded_d(d, group))
    if platform() == "interpreter":
        return interpreter_tile(rows, width)
    # These tiles compile without spills in all versions of Triton that were tried.
    BLOCK_D, threads = (512, 64) if group and not group & (group - 1) else (1024, 256)
    return dict(BLOCK_R=1, BLOCK_D=min(width, BLOCK_D), num_warps=warps(threads // 32))


@triton.jit
def _changes(W, DIAG, R, V, FIXED, column, valid, valid_d):
    """Load w, and compute the change of the error if one entry is removed (a) or kept (b); inf where impossible."""
    w = load(W, column, valid).to(tl.float32)
    r = load(R, column, valid)
    v = load(V, column, valid).to(tl.int1)
    q = w * w * tl.load(DIAG + column, mask=valid_d, other=0.0)[None, :]
    lin = 2 * w * r
    removable = v
    if FIXED is not None:
        removable = v & (load(FIXED, column, valid) == 0)
    a = tl.where(removable & valid, q + lin, float("inf"))
    b = tl.where(v | (valid == 0), float("inf"), q - lin)
    return w, a, b


@triton.jit
def _best(x, start, best, at):
    """Update the lowest entry of every row, `best`, and its column, `at`, by the chunk x that begins at `start`."""
    value, index = tl.min(x, axis=1, return_indices=True)
    lower = value < best
    return tl.where(lower, value, best), tl.where(lower, start + index, at)


@triton.jit
def _partners(w_rows, G, x, y, w, column, valid, stride_g, SHAPE: tl.constexpr):
    """Find the lowest x of every group of a chunk, and its best partner in y.

    Returns the change of the error by each of these pairs, the columns of x, and the columns of y.
    """
    change_x, first = tl.min(tl.reshape(x, SHAPE), axis=2, return_indices=True)
    members = tl.reshape(column, (1, SHAPE[1], SHAPE[2]))
    begin = tl.min(members, axis=2)
    first = begin + first
    inside = tl.max(tl.reshape(valid.to(tl.int32), SHAPE), axis=2) > 0
    w_first = tl.load(w_rows[:, None] + first, mask=inside, other=0.0).to(tl.float32)
    ptrs = G + first.to(tl.int64)[:, :, None] * stride_g + members
    g = tl.load(ptrs, mask=tl.reshape(valid, SHAPE), other=0.0)
    pairs = 2 * w_first[:, :, None] * tl.reshape(w, SHAPE) * g
    change_y, second = tl.min(tl.reshape(y, SHAPE) - pairs, axis=2, return_indices=True)
    return change_x + change_y, first, begin + second


@triton.jit
def _best_of_groups(change, i, p, best, best_i, best_p):
    """Update the best pair of every row by the best pairs of a chunk's groups."""
    value, group = tl.min(change, axis=1, return_indices=True)
    here = tl.arange(0, change.shape[1])[None, :] == group[:, None]
    lower = value < best
    return (
        tl.where(lower, value, best),
        tl.where(lower, tl.sum(tl.where(here, i, 0), axis=1), best_i),
        tl.where(lower, tl.sum(tl.where(here, p, 0), axis=1), best_p),
    )


@triton.jit(launch_metadata=metadata(cost), do_not_specialize=["limit", "least_gain"])
def _swaps_kernel(
    W, G, DIAG, R, V, FIXED, limit, least_gain, rows, d, padded_d, stride_w, stride_g, stride_r, stride_v, stride_f,
    GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    row = row.to(tl.int64)
    w_rows, v_rows = W + row * stride_w, V + row * stride_v
    W += row[:, None] * stride_w
    R += row[:, None] * stride_r
    V += row[:, None] * stride_v
    if FIXED is not None:
        FIXED += row[:, None] * stride_f

    removed = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        column, valid_d, valid = columns(start, d, valid_r, BLOCK_D)
        w = load(W, column, valid).to(tl.float32)
        v = load(V, column, valid).to(tl.int1)
        removed += tl.where(v, 0.0, w * w * tl.load(DIAG + column, mask=valid_d, other=0.0)[None, :])
    threshold = -least_gain * tl.sum(removed, axis=1)

    active = valid_r
    made = 0
    running = limit > 0
    while running:
        inf = tl.full((BLOCK_R,), float("inf"), tl.float32)
        none = tl.zeros((BLOCK_R,), tl.int32)
        # The best pair with the lowest a (of a group), and the best pair with the lowest b.
        change, i, p = inf, none, none
        change_b, i_b, p_b = inf, none, none
        if GROUP:
            SHAPE: tl.constexpr = (BLOCK_R, BLOCK_D // PADDED, PADDED)
            for start in range(0, padded_d, BLOCK_D):
                column, valid_d, valid = columns(start, d, valid_r, BLOCK_D, GROUP, PADDED)
                w, a, b = _changes(W, DIAG, R, V, FIXED, column, valid, valid_d)
                pair, first, second = _partners(w_rows, G, a, b, w, column, valid, stride_g, SHAPE)
                change, i, p = _best_of_groups(pair, first, second, change, i, p)
                pair, first, second = _partners(w_rows, G, b, a, w, column, valid, stride_g, SHAPE)
                change_b, p_b, i_b = _best_of_groups(pair, first, second, change_b, p_b, i_b)
        else:
            # The lowest a and the lowest b.
            best_a, best_b = inf, inf
            for start in range(0, d, BLOCK_D):
                column, valid_d, valid = columns(start, d, valid_r, BLOCK_D)
                w, a, b = _changes(W, DIAG, R, V, FIXED, column, valid, valid_d)
                best_a, i = _best(a, start, best_a, i)
                best_b, p_b = _best(b, start, best_b, p_b)
            # The best partner of each.
            w_i = 2 * tl.load(w_rows + i, mask=valid_r, other=0.0).to(tl.float32)
            w_p = 2 * tl.load(w_rows + p_b, mask=valid_r, other=0.0).to(tl.float32)
            g_i, g_p = G + i.to(tl.int64)[:, None] * stride_g, G + p_b.to(tl.int64)[:, None] * stride_g
            for start in range(0, d, BLOCK_D):
                column, valid_d, valid = columns(start, d, valid_r, BLOCK_D)
                w, a, b = _changes(W, DIAG, R, V, FIXED, column, valid, valid_d)
                pairs = w_i[:, None] * w * load(g_i, column, valid)
                change, p = _best(b - pairs, start, change, p)
                pairs = w_p[:, None] * w * load(g_p, column, valid)
                change_b, i_b = _best(a - pairs, start, change_b, i_b)
            change += best_a
            change_b += best_b
        better = change_b < change
        i, p = tl.where(better, i_b, i), tl.where(better, p_b, p)
        active = active & (tl.minimum(change, change_b) < threshold)

        w_i = tl.load(w_rows + i, mask=active, other=0.0).to(tl.float32)
        w_p = tl.load(w_rows + p, mask=active, other=0.0).to(tl.float32)
        g_i, g_p = G + i.to(tl.int64)[:, None] * stride_g, G + p.to(tl.int64)[:, None] * stride_g
        # A thread may read entries of R and V that another thread stores, and Triton adds no barrier between passes.
        tl.debug_barrier()
        for start in range(0, d, BLOCK_D):
            column, _, moved = columns(start, d, active, BLOCK_D)
            r = load(R, column, moved)
            r += w_i[:, None] * load(g_i, column, moved)
            r -= w_p[:, None] * load(g_p, column, moved)
            # If a row has fewer entries than the program has threads, several threads load the same entry. One of them
            # stores it, perhaps before the others load it. So r must not be used after this line.
            store(R, column, r, moved)
        tl.store(v_rows + i, tl.zeros((BLOCK_R,), tl.int1), mask=active)
        tl.store(v_rows + p, tl.full((BLOCK_R,), 1, tl.int1), mask=active)
        tl.debug_barrier()
        made += 1
        running = (made < limit) & (tl.max(active.to(tl.int32), axis=0) > 0)


@operation(
    reference, cost, example, settings={"": {}, "2:4": dict(group=4)}, writes=("R", "V"), tolerance=1e-3,
    # The error of all masks hardly depends on the order of swaps that are equal up to rounding.
    result=lambda arguments, _: ((arguments["W"] * ~arguments["V"] * arguments["R"]).sum(),),
    launches=(
        *(launch(ALL, group=group, fixed=True) for group in (0, 4, 32)), launch(ALL, d=4095, group=5, fixed=True),
    ),
)  # fmt: skip
def row_swaps(
    W: Tensor, G: Tensor, R: Tensor, V: Tensor, limit: int, *, group: int = 0, fixed: Tensor | None = None
) -> None:
    """Make the best 1-swaps of every row's mask, in place.

    Args:
        W: (rows, d), fp32 / bf16 / fp16. The rows of every matrix are contiguous (column stride 1).
        G: (d, d) fp32, symmetric.
        R: (rows, d) fp32, finite: (W * (1 - V) + target gap) G; updated in place.
        V: (rows, d) bool, the mask; updated in place.
        limit: highest number of swaps of a row.
        group: 0 for swaps within whole rows, m for swaps within the groups of n:m; up to 32.
        fixed: (rows, d) bool, True for entries that are never removed.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    rows, d = check_matrix("W", W, FLOATS)
    check_rows((d, d), W, FP32, G=G)
    check_rows((rows, d), W, FLOATS, W=W)
    check_rows((rows, d), W, FP32, R=R)
    check_rows((rows, d), W, BOOL, V=V, fixed=fixed)
    check_selection(rows, d, 0, group, fixed, W)
    if limit < 0:
        raise ValueError(f"limit: expected at least 0, got {limit}")
    if W.numel() == 0:
        return
    launch_rows(
        _swaps_kernel, configuration(rows, d, group), W, G, G.diagonal().contiguous(), R, V, fixed, limit, LEAST_GAIN,
        d=d, padded_d=padded_d(d, group),
        **row_strides(w=W, g=G, r=R, v=V, f=fixed),
        GROUP=group, PADDED=triton.next_power_of_2(group) if group else 0,
    )  # fmt: skip
