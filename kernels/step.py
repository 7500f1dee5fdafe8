"""row_step: make a Frank-Wolfe step except for its product, in place. A program works on one or a few rows.

    D    = V - M                                    q = W^2 diag
    lin  = sum(D * (-2 W R + theta q (1 - 2 M)))    quad = sum(W D (R - U)) - theta sum(q D^2)
    eta  = clip(-lin / (2 quad), 0, 1)              if quad <= 0: the better of 0 and 1
    M   += eta D                                    R   += eta (U - R)
    V    = lmo(2 W R - next_theta q (1 - 2 M))      E    = target_gap + W * (1 - V)

    W, E (rows, d)     M, R, U, target_gap (rows, d) fp32     V, fixed (rows, d) bool     diag (d,) fp32

A row that fits one chunk stays in registers. Only its W and V are loaded twice, the second time from the cache. A
multiprocessor of sm_90 works on two or more such rows at the same time, if they have up to 4096 columns, and strides
that are multiples of 16 entries: while one row chooses its vertex, others are loaded and stored. Of longer rows a
multiprocessor works on one at a time.

A row longer than a chunk takes several passes over its chunks, which are read from the cache as far as they fit:

    A    sums the terms of the line search
    B    updates M and R, and overwrites U by the keys of the scores, from the last chunk to the first, since the cache
         still holds the last chunks. With n:m it also chooses V, writes V and E, and ends the step
    C    finds the k-th key (topk.py)
    D    writes V and E

The search for the k-th key starts from the threshold that the previous step of the row has found. `threshold` (rows,)
holds it, in 4 bytes a row. Equal scores go to the lower index. Sums and state are in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .definitions import RowState, widened
from .device import columns, load, store
from .launch import (
    BOOL,
    FLOATS,
    FP32,
    check,
    check_matrix,
    check_rows,
    interpreter_tile,
    launch_rows,
    platform,
    row_strides,
    warps,
)
from .lmo import check_selection, padded_d, selection_options
from .lmo import reference as best_vertex
from .operation import ALL, HOPPER, Arguments, Cost, Size, launch, metadata, operation
from .plain import removed
from .topk import (
    bracket,
    candidate_key,
    key_range,
    key_score,
    kth_key,
    load_budget,
    load_keys,
    lowest_key,
    order_key,
    take,
    take_of_groups,
)


def reference(
    state: RowState,
    *,
    eta: float | Tensor | None = None,
    theta: float | Tensor = 0.0,
    next_theta: float | Tensor = 0.0,
) -> None:
    """Compute the operation in plain torch."""
    w, M, R, U = widened(state.W), state.M, state.R, state.U
    q, D = w**2 * state.diag, state.V.float() - M
    if eta is None:
        lin = (D * (-2 * w * R + theta * q * (1 - 2 * M))).sum(1)
        quad = (w * D * (R - U)).sum(1) - theta * (q * D**2).sum(1)
        eta = torch.where(quad > 0, (-lin / (2 * quad)).clamp(0, 1), lin + quad < 0)
    state.eta[:] = eta
    M += state.eta[:, None] * D
    R += state.eta[:, None] * (U - R)
    state.error.copy_((w * (1 - M) * R).sum(1))
    best_vertex(
        scores(state, next_theta), state.k, group=state.group, fixed=state.fixed, positive=bool(next_theta < 1),
        check_nan=False, out=state.V,
    )  # fmt: skip
    removed(w, state.V, state.target_gap, out=state.E)


def scores(state: RowState, theta: float | Tensor) -> Tensor:
    """Compute the scores among which a vertex is chosen."""
    w = widened(state.W)
    return 2 * w * state.R - theta * (w**2 * state.diag) * (1 - 2 * state.M)


def cost(W: Tensor, E: Tensor, fixed: Tensor | None = None, target_gap: Tensor | None = None) -> Cost:
    """Read W, M, R, U, V, `fixed` and the target gap, and write M, R, V, E."""
    entry = W.itemsize + 22 + E.itemsize + (fixed is not None) + 4 * (target_gap is not None)
    return Cost(30 * W.numel(), W.numel() * entry)


def example(
    size: Size, *, group: int = 0, target: bool = False, fixed: bool = False, open_loop: bool = False
) -> Arguments:
    """Make the first step of a solve, from a random mask. On a GPU theta, next_theta and eta are tensors.

    W and E are in `size.dtype`; with `target` W is in fp32. With `open_loop` eta is given, there is no threshold, and
    each row has a budget of its own.
    """
    W, G = size.matrix(dtype=torch.float32 if target else size.dtype), size.gram()
    k: Any = group // 2 or int(0.4 * size.d)
    eta, error = torch.zeros(2, size.rows, device=size.device)
    if open_loop:
        k = torch.full_like(eta, k, dtype=torch.int32)
    V = best_vertex(size.matrix(seed=1), k, group=group, check_nan=False)
    fixed_entries, gap = V & size.mask(seed=3) if fixed else None, 0.1 * size.matrix(seed=2) if target else None
    R, E = removed(W, V, gap).float() @ G, torch.empty_like(W, dtype=size.dtype)
    diag = G.diagonal().contiguous()
    state = RowState(W, diag, V.float(), R, R, V, E, k, eta, error, group, fixed_entries, gap)
    numbers: Arguments = dict(theta=0.5, next_theta=0.6)
    # A step of length 0 chooses V and E.
    reference(state, eta=0.0, next_theta=numbers["theta"])
    state.U = E.float() @ G
    if open_loop:
        numbers["eta"] = 0.3
    else:
        state.threshold = scores(state, numbers["theta"]).masked_fill(~V, torch.inf).amin(1)
    if size.device != "cpu":
        numbers = {name: torch.tensor(x, device=size.device) for name, x in numbers.items()}
    return dict(state=state, **numbers)


def result(arguments: Arguments, _: None) -> tuple[Tensor, ...]:
    """Select the outputs. A vertex counts by the sum of its scores, since nearly equal scores may change places."""
    state = arguments["state"]
    value = (scores(state, arguments["next_theta"]) * state.V).sum(1)
    return state.error, state.eta, state.M, state.R, value


def configuration(rows: int, d: int, group: int) -> dict[str, int]:
    """Choose tile sizes and launch options: BLOCK_R rows, chunks of BLOCK_D columns, SEARCH_D keys in registers."""
    width = triton.next_power_of_2(padded_d(d, group))
    if platform() == "interpreter":
        tile = interpreter_tile(rows, width)
        return tile | dict(SEARCH_D=tile["BLOCK_D"])
    if group & (group - 1):
        # If the group size is not a power of two, every entry needs an address in registers, so chunks are short. No
        # entry belongs to two warps, since one warp could then read what the other has already overwritten.
        chunk = min(width, 1024)
        return dict(BLOCK_R=1, BLOCK_D=chunk, SEARCH_D=chunk, num_warps=warps(max(1, chunk // 128)))
    if width <= (4096 if group else 8192):
        # The whole row stays in registers, with 8 to 16 entries in a thread.
        tile = dict(BLOCK_R=max(1, 1024 // width), BLOCK_D=width, SEARCH_D=width)
        return tile | dict(num_warps=warps(max(4, width // 512)))
    if group:
        return dict(BLOCK_R=1, BLOCK_D=4096, SEARCH_D=4096, num_warps=warps(16))
    # Each of 1024 threads has 4 entries of a chunk, and 16 keys, or 32 keys of a row of up to 32768. With more keys
    # some versions of the compiler spill. In a longer row the search reads the other keys from the cache.
    search = width if width <= 32768 else 16384
    return dict(BLOCK_R=1, BLOCK_D=4096, SEARCH_D=search, num_warps=warps(32))


@triton.jit
def _line_terms(w, q, m, r, u, v, theta):
    """Compute the term of each entry in the sums lin and quad."""
    D = v - m
    WD = w * D
    qD = theta * q * D
    return qD * (1 - 2 * m) - 2 * WD * r, WD * (r - u) - qD * D


@triton.jit
def _line_search(lin, quad):
    """Find the step size eta in [0, 1] that minimizes lin eta + quad eta^2. If quad <= 0, this is 0 or 1."""
    inner = tl.minimum(tl.maximum(-lin / (2 * tl.where(quad > 0, quad, 1.0)), 0.0), 1.0)
    return tl.where(quad > 0, inner, tl.where(lin + quad < 0, 1.0, 0.0))


@triton.jit
def _load_state(W, M, R, U, V, column, valid):
    """Load one chunk of w, m, r, u, v in fp32. The pointers point at the first column of the tile's rows."""
    w = load(W, column, valid).to(tl.float32)
    m = load(M, column, valid)
    r = load(R, column, valid)
    u = load(U, column, valid)
    v = load(V, column, valid).to(tl.float32)
    return w, m, r, u, v


@triton.jit
def _diagonal(DIAG, w, column, valid_d):
    # DIAG is loaded from the cache at each use, since a whole row in registers leaves few of them.
    return w * w * tl.load(DIAG + column, mask=valid_d, other=0.0)[None, :]


@triton.jit
def _advance(DIAG, M, R, FIXED, w, m, r, u, v, step, next_theta, column, valid, valid_d):
    """Update one chunk of M and R, and store it; return the next score and the error of each entry."""
    m += step[:, None] * (v - m)
    r += step[:, None] * (u - r)
    store(M, column, m, valid)
    store(R, column, r, valid)
    q = _diagonal(DIAG, w, column, valid_d)
    score = 2 * w * r - next_theta * q * (1 - 2 * m)
    if FIXED is not None:
        is_fixed = load(FIXED, column, valid).to(tl.int1)
        score = tl.where(is_fixed, float("inf"), score)
    return score, w * (1 - m) * r


@triton.jit
def _store_vertex(V, E, TARGET_GAP, w, chosen, column, valid):
    store(V, column, chosen, valid)
    e = tl.where(chosen, 0.0, w)
    if TARGET_GAP is not None:
        e += load(TARGET_GAP, column, valid)
    store(E, column, e, valid)


@triton.jit
def _store_step(ETA, ERROR, row, valid_r, step, errors):
    # Called before the vertex is chosen, since the search needs the registers.
    tl.store(ETA + row, step, mask=valid_r)
    tl.store(ERROR + row, tl.sum(errors, axis=1), mask=valid_r)


@triton.jit
def _find_threshold(THRESHOLD, row, valid_r, lowest, budget, keys, scores, WHOLE: tl.constexpr):
    """Find the threshold of each row by `kth_key`. The search starts from THRESHOLD, and replaces it.

    If THRESHOLD is None, the search starts from the range of the keys.
    """
    if THRESHOLD is None:
        ends, budget, _ = key_range(budget, keys, scores, WHOLE)
    else:
        start = order_key(tl.load(THRESHOLD + row, mask=valid_r, other=0.0))
        ends = bracket(start, lowest + 1, budget, keys, scores, WHOLE)
    threshold, ties_kept, tied = kth_key(ends, budget, keys, scores, WHOLE)
    if THRESHOLD is not None:
        tl.store(THRESHOLD + row, key_score(threshold), mask=valid_r)
    return threshold, ties_kept, tied


@triton.jit(launch_metadata=metadata(cost), do_not_specialize=["k", "eta", "theta", "next_theta"])
def _step_kernel(
    W, DIAG, M, R, U, V, E, FIXED, TARGET_GAP, THRESHOLD, ETA, ERROR, k, eta, theta, next_theta, rows, d, padded_d,
    stride_w, stride_m, stride_r, stride_u, stride_v, stride_e, stride_f, stride_t, stride_k,
    STORED: tl.constexpr, LINE_SEARCH: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr,
    PADDED: tl.constexpr, ONE_CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SEARCH_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    # With BLOCK_R = 1 the program's row exists, and needs no mask, whose registers the search needs.
    valid_r = row < rows if BLOCK_R > 1 else tl.full((BLOCK_R,), True, tl.int1)
    row = row.to(tl.int64)
    W += row[:, None] * stride_w
    M += row[:, None] * stride_m
    R += row[:, None] * stride_r
    U += row[:, None] * stride_u
    V += row[:, None] * stride_v
    E += row[:, None] * stride_e
    if FIXED is not None:
        FIXED += row[:, None] * stride_f
    if TARGET_GAP is not None:
        TARGET_GAP += row[:, None] * stride_t
    budget = load_budget(k, row, valid_r, stride_k, PER_ROW, BLOCK_R)
    if STORED:
        theta = tl.load(theta)
        next_theta = tl.load(next_theta)
        if not LINE_SEARCH:
            eta = tl.load(eta)
    step = tl.zeros((BLOCK_R,), tl.float32)
    if not LINE_SEARCH:
        step += eta
    lowest = lowest_key(next_theta < 1)
    # The keys of a row longer than a chunk replace U.
    stored_keys = U, None, d, valid_r, 1, 0, None

    if ONE_CHUNK:
        column, valid_d, valid = columns(0, d, valid_r, BLOCK_D, GROUP, PADDED)
        w, m, r, u, v = _load_state(W, M, R, U, V, column, valid)
        if LINE_SEARCH:
            lin, quad = _line_terms(w, _diagonal(DIAG, w, column, valid_d), m, r, u, v, theta)
            step = _line_search(tl.sum(lin, axis=1), tl.sum(quad, axis=1))
            # w and v are loaded again from the cache: without them in registers, a multiprocessor works on twice as
            # many rows. The eviction policy keeps the compiler from merging these loads with the first loads.
            w = tl.load(W + column[None, :], mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
            v = tl.load(V + column[None, :], mask=valid, other=0, eviction_policy="evict_first").to(tl.float32)
        score, errors = _advance(DIAG, M, R, FIXED, w, m, r, u, v, step, next_theta, column, valid, valid_d)
        _store_step(ETA, ERROR, row, valid_r, step, errors)
        keys = candidate_key(score, None, valid, lowest)
        if GROUP:
            chosen = take_of_groups(keys, k, GROUP, PADDED, BLOCK_R, BLOCK_D)
        else:
            threshold, ties_kept, tied = _find_threshold(
                THRESHOLD, row, valid_r, lowest, budget, keys, stored_keys, WHOLE=True
            )
            chosen, passed = take(keys, threshold, ties_kept, tied, tl.zeros((BLOCK_R,), tl.int32))
            # `padded_d` equals d here, but the compiler does not know it. So it computes the masks again, and does not
            # keep them in registers during the search.
            column, _, valid = columns(0, padded_d, valid_r, BLOCK_D)
        _store_vertex(V, E, TARGET_GAP, w, chosen, column, valid)
    else:
        # Pass A: the step size.
        if LINE_SEARCH:
            lin = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            quad = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            for start in range(0, padded_d, BLOCK_D):
                column, valid_d, valid = columns(start, d, valid_r, BLOCK_D, GROUP, PADDED)
                w, m, r, u, v = _load_state(W, M, R, U, V, column, valid)
                lin_d, quad_d = _line_terms(w, _diagonal(DIAG, w, column, valid_d), m, r, u, v, theta)
                lin += lin_d
                quad += quad_d
            step = _line_search(tl.sum(lin, axis=1), tl.sum(quad, axis=1))

        # Pass B: the update and the next scores.
        errors = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for back in range(0, padded_d, BLOCK_D):
            last = (padded_d - 1) // BLOCK_D * BLOCK_D
            column, valid_d, valid = columns(last - back, d, valid_r, BLOCK_D, GROUP, PADDED)
            w, m, r, u, v = _load_state(W, M, R, U, V, column, valid)
            score, error_d = _advance(DIAG, M, R, FIXED, w, m, r, u, v, step, next_theta, column, valid, valid_d)
            errors += error_d
            keys = candidate_key(score, None, valid, lowest)
            if GROUP:
                chosen = take_of_groups(keys, k, GROUP, PADDED, BLOCK_R, BLOCK_D)
                _store_vertex(V, E, TARGET_GAP, w, chosen, column, valid)
            else:
                store(U, column, keys.to(tl.float32, bitcast=True), valid)
        _store_step(ETA, ERROR, row, valid_r, step, errors)

        if not GROUP:
            # Pass C reads keys that another thread may have stored in pass B, and Triton adds no barrier.
            tl.debug_barrier()
            # Pass C: the k-th key.
            first_keys = load_keys(stored_keys, 0, SEARCH_D)
            threshold, ties_kept, tied = _find_threshold(
                THRESHOLD, row, valid_r, lowest, budget, first_keys, stored_keys, WHOLE
            )
            # Pass D: the vertex.
            passed = tl.zeros((BLOCK_R,), tl.int32)
            for start in range(0, d, BLOCK_D):
                column, _, valid = columns(start, d, valid_r, BLOCK_D)
                keys = load_keys(stored_keys, start, BLOCK_D)
                chosen, passed = take(keys, threshold, ties_kept, tied, passed)
                w = load(W, column, valid).to(tl.float32)
                _store_vertex(V, E, TARGET_GAP, w, chosen, column, valid)


@operation(
    reference, cost, example, settings={"": {}, "2:4": dict(group=4), "target": dict(target=True)}, writes=("state",),
    result=result, tolerance=1e-4,
    launches=(
        *(launch(ALL, d=d, fixed=True) for d in (4096, 14336, 28672, 65536)),
        *(launch(ALL, d=d, group=32, fixed=True) for d in (4096, 14336)),
        launch(ALL, d=4095, group=5, fixed=True), launch(HOPPER, open_loop=True),
    ),
)  # fmt: skip
def row_step(
    state: RowState,
    *,
    eta: float | Tensor | None = None,
    theta: float | Tensor = 0.0,
    next_theta: float | Tensor = 0.0,
) -> None:
    """Make a Frank-Wolfe step in every row, except for its product, in place.

    `eta`, `theta` and `next_theta` are either all floats, or all tensors () fp32, which the kernel reads when it runs.

    Args:
        state: the state, updated in place.
        eta: step size of all rows; None: a line search finds the step size of each row.
        theta: weight of the integrality penalty when V was chosen, 0 to 1.
        next_theta: weight of the penalty for the choice of the next V. Below 1 a vertex keeps only entries with
            positive scores; at 1 it keeps exactly k entries.

    Raises:
        ValueError, TypeError: the state or a number does not fit this description.
    """
    W, k, fixed, target_gap, threshold = state.W, state.k, state.fixed, state.target_gap, state.threshold
    rows, d = check_matrix("W", W, FLOATS)
    check_rows((rows, d), W, FLOATS, W=W, E=state.E)
    check_rows((rows, d), W, FP32, M=state.M, R=state.R, U=state.U, target_gap=target_gap)
    check_rows((rows, d), W, BOOL, V=state.V, fixed=fixed)
    check_selection(rows, d, k, state.group, fixed, W)
    check_rows((d,), W, FP32, diag=state.diag)
    check_rows((rows,), W, FP32, eta=state.eta, error=state.error, threshold=threshold)
    numbers = dict(theta=theta, next_theta=next_theta) | ({} if eta is None else dict(eta=eta))
    stored = any(isinstance(number, Tensor) for number in numbers.values())
    for name, number in numbers.items():
        if stored:
            check(name, number, (), FP32, W)
        else:
            numbers[name] = float(number)
    if W.numel() == 0:
        state.eta.zero_()
        state.error.zero_()
        return
    config = configuration(rows, d, state.group)
    launch_rows(
        _step_kernel, config,
        W, state.diag, state.M, state.R, state.U, state.V, state.E,
        fixed, target_gap, threshold, state.eta, state.error, k, **{"eta": 0.0, **numbers},
        **row_strides(w=W, m=state.M, r=state.R, u=state.U, v=state.V, e=state.E, f=fixed, t=target_gap),
        STORED=stored, LINE_SEARCH=eta is None, **selection_options(d, k, state.group, config),
    )  # fmt: skip
