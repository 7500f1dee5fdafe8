"""Device functions shared by the kernels: dot product, order of tiles, order of scores, selection, step formulas.

Selection works on 32-bit unsigned keys in the order of the scores, so that "the k best" is exact:

    key(x) < key(y)  iff  x < y;    key(-0.0) = key(+0.0);    key(NaN) = NAN_KEY, above all;    0 = no entry

The k-th best key of a row is found by regula falsi on the number of keys that reach a threshold, with the weights of
the Illinois method, so that no end stays where it is. It ends once a threshold separates exactly k entries: after 9 to
10 counts on the scores of a solve, where bisection on the bits takes 15 to 18 (`bench/counts.py`). Where 16 were not
enough it goes on by halves, so that there never are more than 50. A count is one comparison an entry and one sum. Radix
selection by 4 bits takes 8 passes, but each has 15 sums to find, or a histogram in shared memory with an atomic an
entry. Only a row with a tie at its k-th key needs the running count that gives the tie to the lower index.

bfloat16 values are loaded, stored and multiplied by `dot`, never computed with: the interpreter would work on their
bit patterns. Every kernel converts to fp32 right after a load.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

NAN_KEY = tl.constexpr(0xFFFFFFFF)
INF_KEY = tl.constexpr(0xFF800000)
ZERO_KEY = tl.constexpr(0x80000000)

# Counts after which a search that is not done halves what is left.
PATIENCE = tl.constexpr(16)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even."""
    if INTERPRET and tl.bfloat16 == DTYPE and x.dtype != tl.bfloat16:
        # The interpreter cuts the low bits off; rounded here, none are left to cut.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b with operands in DTYPE and fp32 accumulation; PRECISION ("ieee", "tf32") is that of fp32 operands."""
    a = cast(a, DTYPE)
    b = cast(b, DTYPE)
    if INTERPRET:
        # numpy has no bfloat16, and fp32 holds 16-bit values exactly.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def grouped_tile(tile, rows, d, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and first column of a tile of a (rows, d) product.

    In grouped order: programs that run together share rows of the left operand and columns of the right one in the
    cache.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(d, BLOCK_N)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return (first_m + within % group_m) * BLOCK_M, within // group_m * BLOCK_N


@triton.jit
def order_key(x):
    """The uint32 key of an fp32 score."""
    bits = x.to(tl.uint32, bitcast=True)
    # -0.0 differs from +0.0 in its sign bit only.
    bits = tl.where(bits == 0x80000000, 0, bits)
    # Positive floats go above all negative ones, whose order the flip of all bits reverses.
    key = tl.where(bits < 0x80000000, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, NAN_KEY, key)


@triton.jit
def lowest_key(positive):
    """Candidates have keys above this one: that of score 0 where only `positive` ones count, else 0, of no entry."""
    return tl.where(positive, ZERO_KEY, 0).to(tl.uint32)


@triton.jit
def candidate_key(x, held, valid, lowest):
    """Key of score x for a selection: `held` (or None) entries come first; scores not above `lowest` are no entry."""
    key = order_key(x)
    if held is not None:
        # A NaN stays one where it is held: it is an error wherever it stands.
        key = tl.where(held & (key != NAN_KEY), INF_KEY, key)
    return tl.where(valid & (key > lowest), key, 0)


@triton.jit
def columns(start, d, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr = 4):
    """Columns of one chunk and which of them exist.

    Groups of a size that is no power of two are laid out PADDED apart, so that a chunk reshapes into whole groups. A
    thread has at most so many columns TOGETHER.
    """
    # In fours: what is loaded for a column, of 1, 2 or 4 bytes, has one layout in the registers then. By 16 bytes a
    # thread each, threads would load floats far apart, and pass them through shared memory to where the others are.
    index = start + tl.max_contiguous(tl.arange(0, BLOCK_D), TOGETHER)
    if GROUP == PADDED:
        column = index
        valid = index < d
    else:
        column = index // PADDED * GROUP + index % PADDED
        valid = (index % PADDED < GROUP) & (column < d)
    return column, valid


@triton.jit
def load_keys(
    score, fixed, start, d, valid_r, stride_sd, stride_fd, lowest,
    GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys (BLOCK_R, BLOCK_D) of one chunk; `score` and `fixed` point at the first column of the tile's rows.

    Without `lowest` what lies in the place of scores are their keys, bit for bit.
    """
    # Members of a group are compared with each other: best within a thread.
    column, valid_d = columns(start, d, GROUP, PADDED, BLOCK_D, 16 if GROUP else 4)
    valid = valid_r[:, None] & valid_d[None, :]
    column = column[None, :].to(tl.int64)
    x = tl.load(score + column * stride_sd, mask=valid, other=0.0)
    if lowest is None:
        keys = x.to(tl.uint32, bitcast=True)
    else:
        held = None
        if fixed is not None:
            held = tl.load(fixed + column * stride_fd, mask=valid, other=0).to(tl.int1)
        keys = candidate_key(x, held, valid, lowest)
    return keys


@triton.jit
def load_budget(k, row, valid_r, stride_k, PER_ROW: tl.constexpr, BLOCK_R: tl.constexpr):
    """k (BLOCK_R,) of the tile's rows: one number for all, or read at k + row * stride_k."""
    if PER_ROW:
        budget = tl.load(k + row * stride_k, mask=valid_r, other=0).to(tl.int32)
    else:
        budget = tl.zeros((BLOCK_R,), tl.int32) + k
    return budget


@triton.jit
def count_reaching(
    T, keys, score, fixed, d, valid_r, stride_sd, stride_fd, lowest,
    WHOLE: tl.constexpr, SEARCH_D: tl.constexpr,
):  # fmt: skip
    """Entries per row with a key >= T: those of `keys`, the first SEARCH_D columns, and unless WHOLE the others."""
    n = tl.sum((keys >= T[:, None]).to(tl.int32), axis=1)
    if not WHOLE:
        for start in range(SEARCH_D, d, SEARCH_D):
            others = load_keys(score, fixed, start, d, valid_r, stride_sd, stride_fd, lowest, 0, 0, SEARCH_D)
            n += tl.sum((others >= T[:, None]).to(tl.int32), axis=1)
    return n


@triton.jit
def key_range(
    keys, score, fixed, d, valid_r, stride_sd, stride_fd, lowest, WHOLE: tl.constexpr, SEARCH_D: tl.constexpr
):  # fmt: skip
    """Entries per row, and the lowest and the highest of their keys; arguments as in `count_reaching`."""
    n = tl.sum((keys > 0).to(tl.int32), axis=1)
    low = tl.min(tl.where(keys > 0, keys, NAN_KEY), axis=1)
    high = tl.max(keys, axis=1)
    if not WHOLE:
        for start in range(SEARCH_D, d, SEARCH_D):
            others = load_keys(score, fixed, start, d, valid_r, stride_sd, stride_fd, lowest, 0, 0, SEARCH_D)
            n += tl.sum((others > 0).to(tl.int32), axis=1)
            low = tl.minimum(low, tl.min(tl.where(others > 0, others, NAN_KEY), axis=1))
            high = tl.maximum(high, tl.max(others, axis=1))
    return n, low, high


@triton.jit
def kth_key(
    n, low, high, keys, k, score, fixed, d, valid_r, stride_sd, stride_fd, lowest,
    WHOLE: tl.constexpr, SEARCH_D: tl.constexpr,
):  # fmt: skip
    """A threshold T per row that at least k keys reach, and what to do about the surplus.

    Args:
        n, low, high: of `key_range`.
        k: (BLOCK_R,) int32, how many to find; all where there are fewer.

    Returns:
        T (BLOCK_R,) uint32: keep the keys >= T, but
        room (BLOCK_R,) int32: of those equal to T only the first `room`;
        tied: whether any row of the tile has such a surplus.
    """
    k = tl.minimum(k, n)
    # At least k keys reach T, n of them; fewer than k reach `top`, n_top of them.
    T = low
    top = tl.minimum(high, NAN_KEY - 1) + 1
    n_top = tl.zeros_like(n)
    # Of the end that stayed where it was when the other one moved, halved every time.
    weight = n_top.to(tl.float32) + 1.0
    rose = n_top > 0
    made = 0
    running = (n > k) & (top - T > 1)
    while tl.max(running.to(tl.int32), axis=0) > 0:
        surplus = (n - k).to(tl.float32) * tl.where(rose, 1.0, weight)
        lack = (k - n_top).to(tl.float32) * tl.where(rose, weight, 1.0)
        part = tl.where(made < PATIENCE, surplus / tl.maximum(surplus + lack, 1e-30), 0.5)
        made += 1
        reach = T + ((top - T).to(tl.float32) * part).to(tl.uint32)
        reach = tl.minimum(tl.maximum(reach, T + 1), top - 1)
        m = count_reaching(reach, keys, score, fixed, d, valid_r, stride_sd, stride_fd, lowest, WHOLE, SEARCH_D)
        rises = m >= k
        weight = tl.where(rises == rose, 0.5 * weight, 1.0)
        rose = rises
        T = tl.where(running & rises, reach, T)
        n = tl.where(running & rises, m, n)
        top = tl.where(running & (rises == 0), reach, top)
        n_top = tl.where(running & (rises == 0), m, n_top)
        running = (n > k) & (top - T > 1)
    # Between T and top is nothing now, where n > k: n - n_top keys are equal to T.
    tied = tl.max(n - k, axis=0) > 0
    room = tl.where(n > k, k - n_top, 0x7FFFFFFF)
    return T, room, tied


@triton.jit
def take(keys, T, room, tied, passed):
    """The entries of one chunk that are kept, and `passed`, the ties seen so far, for the next chunk."""
    chosen = keys >= T[:, None]
    if tied:
        tie = (keys == T[:, None]).to(tl.int32)
        chosen = chosen & ((tie == 0) | (passed[:, None] + tl.cumsum(tie, axis=1) <= room[:, None]))
        passed += tl.sum(tie, axis=1)
    return chosen, passed


@triton.jit
def take_of_groups(
    keys, n, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The n best of every group of a chunk laid out by `columns`: those that fewer than n others beat."""
    keys = tl.reshape(keys, (BLOCK_R, BLOCK_D // PADDED, PADDED))
    slot = tl.arange(0, PADDED)[None, None, :]
    rank = tl.zeros((BLOCK_R, BLOCK_D // PADDED, PADDED), tl.int32)
    for i in tl.static_range(GROUP):
        other = tl.sum(tl.where(slot == i, keys, 0), axis=2)[:, :, None]
        rank += ((other > keys) | ((other == keys) & (i < slot))).to(tl.int32)
    return tl.reshape((rank < n) & (keys > 0), (BLOCK_R, BLOCK_D))


@triton.jit
def move(x, target, eta):
    """x + eta (target - x)."""
    return x + eta * (target - x)


@triton.jit
def line_terms(w, q, m, r, u, v, theta):
    """Each entry's share of lin and quad, see `reference.row_step`."""
    D = v - m
    WD = w * D
    qD = theta * q * D
    return qD * (1 - 2 * m) - 2 * WD * r, WD * (r - u) - qD * D


@triton.jit
def line_search(lin, quad):
    """The step size in [0, 1] that minimizes lin eta + quad eta^2; where quad <= 0, the better end."""
    inner = tl.minimum(tl.maximum(-lin / (2 * tl.where(quad > 0, quad, 1.0)), 0.0), 1.0)
    return tl.where(quad > 0, inner, tl.where(lin + quad < 0, 1.0, 0.0))


@triton.jit
def vertex_score(w, q, m, r, theta):
    """Negative gradient, see `reference.row_step`."""
    return 2 * w * r - theta * q * (1 - 2 * m)
