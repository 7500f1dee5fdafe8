"""Selection on the device: the k best scores of a row, or n of every group, exactly.

Scores are compared through 32-bit unsigned keys, which have the same order:

    key(x) < key(y)  iff  x < y;    key(-0.0) = key(+0.0);    key(NaN) = NAN_KEY, above all;    0 = no entry

A row's k-th best key is found by regula falsi on a count: how many keys reach a threshold. The weights of the Illinois
method keep either end of the bracket from standing still. The search ends once a threshold separates exactly k entries.
On the scores of a solve it takes 9 to 10 counts, bisection on the bits 15 to 18 (`bench/counts.py`). After 16 counts it
bisects, so there are never more than 50. A count costs one comparison an entry and one sum. Radix selection by 4 bits
would take 8 passes, each with 15 sums, or with a histogram in shared memory and an atomic an entry. Only a row with a
tie at its k-th key needs the running count that gives the tie to the lower index.
"""

import triton
import triton.language as tl

from .device import columns

NAN_KEY = tl.constexpr(0xFFFFFFFF)
INF_KEY = tl.constexpr(0xFF800000)
ZERO_KEY = tl.constexpr(0x80000000)

# After this many counts the search bisects.
PATIENCE = tl.constexpr(16)


@triton.jit
def order_key(x):
    """The uint32 key of an fp32 score."""
    bits = x.to(tl.uint32, bitcast=True)
    # -0.0 differs from +0.0 in its sign bit only.
    bits = tl.where(bits == 0x80000000, 0, bits)
    # Positive floats come above negative ones. Flipping all bits of a negative float reverses the order of its kind.
    key = tl.where(bits < 0x80000000, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, NAN_KEY, key)


@triton.jit
def lowest_key(positive):
    """The key that candidates must exceed: of score 0 if only positive scores count, else 0, the key of no entry."""
    return tl.where(positive, ZERO_KEY, 0).to(tl.uint32)


@triton.jit
def candidate_key(x, fixed, valid, lowest):
    """Key of score x for a selection.

    A fixed entry (`fixed` may be None) has the key of +inf. A key that is not above `lowest` becomes 0, no entry.
    """
    key = order_key(x)
    if fixed is not None:
        # A NaN is an error at fixed entries too, so it keeps its key.
        key = tl.where(fixed & (key != NAN_KEY), INF_KEY, key)
    return tl.where(valid & (key > lowest), key, 0)


@triton.jit
def load_keys(
    score, fixed, start, d, valid_r, stride_sd, stride_fd, lowest,
    GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys (BLOCK_R, BLOCK_D) of one chunk; `score` and `fixed` point at the first column of the tile's rows.

    If `lowest` is None, `score` holds keys instead of scores, bit for bit.
    """
    # A group lies within one thread, since its members are compared with each other.
    column, valid_d = columns(start, d, GROUP, PADDED, BLOCK_D, 16 if GROUP else 4)
    valid = valid_r[:, None] & valid_d[None, :]
    column = column[None, :].to(tl.int64)
    x = tl.load(score + column * stride_sd, mask=valid, other=0.0)
    if lowest is None:
        keys = x.to(tl.uint32, bitcast=True)
    else:
        is_fixed = None
        if fixed is not None:
            is_fixed = tl.load(fixed + column * stride_fd, mask=valid, other=0).to(tl.int1)
        keys = candidate_key(x, is_fixed, valid, lowest)
    return keys


@triton.jit
def load_budget(k, row, valid_r, stride_k, PER_ROW: tl.constexpr, BLOCK_R: tl.constexpr):
    """Budgets (BLOCK_R,) of the tile's rows: the number k for all, or numbers read at k + row * stride_k."""
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
    """Number of entries per row with a key >= T.

    `keys` has the first SEARCH_D columns. Unless they are the WHOLE row, the other columns are loaded.
    """
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
    """Number of entries per row, their lowest and their highest key; arguments as in `count_reaching`."""
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
    """A threshold T per row that at least k keys reach, and how many of the keys equal to T to keep.

    Args:
        n, low, high: results of `key_range`.
        k: (BLOCK_R,) int32, entries to keep; a row with fewer keeps all.

    Returns:
        T (BLOCK_R,) uint32: keys above T are kept;
        ties_kept (BLOCK_R,) int32: of the keys equal to T the first `ties_kept` are kept;
        tied: whether any row of the tile has to leave out keys equal to T.
    """
    k = tl.minimum(k, n)
    # The bracket: n >= k keys reach T, n_top < k keys reach `top`.
    T = low
    top = tl.minimum(high, NAN_KEY - 1) + 1
    n_top = tl.zeros_like(n)
    # Weight of the end that did not move last time; halved each time it stays again.
    weight = n_top.to(tl.float32) + 1.0
    rose = n_top > 0
    made = 0
    running = (n > k) & (top - T > 1)
    while tl.max(running.to(tl.int32), axis=0) > 0:
        surplus = (n - k).to(tl.float32) * tl.where(rose, 1.0, weight)
        shortage = (k - n_top).to(tl.float32) * tl.where(rose, weight, 1.0)
        share = tl.where(made < PATIENCE, surplus / tl.maximum(surplus + shortage, 1e-30), 0.5)
        made += 1
        reach = T + ((top - T).to(tl.float32) * share).to(tl.uint32)
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
    # A row with n > k has no key between T and top now: n - n_top keys are equal to T.
    tied = tl.max(n - k, axis=0) > 0
    ties_kept = tl.where(n > k, k - n_top, 0x7FFFFFFF)
    return T, ties_kept, tied


@triton.jit
def take(keys, T, ties_kept, tied, passed):
    """The entries of one chunk that are kept, and `passed`, the number of ties so far, for the next chunk."""
    chosen = keys >= T[:, None]
    if tied:
        tie = (keys == T[:, None]).to(tl.int32)
        chosen = chosen & ((tie == 0) | (passed[:, None] + tl.cumsum(tie, axis=1) <= ties_kept[:, None]))
        passed += tl.sum(tie, axis=1)
    return chosen, passed


@triton.jit
def take_of_groups(
    keys, n, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The n best of every group of a chunk laid out by `columns`: entries that fewer than n others beat."""
    keys = tl.reshape(keys, (BLOCK_R, BLOCK_D // PADDED, PADDED))
    slot = tl.arange(0, PADDED)[None, None, :]
    rank = tl.zeros((BLOCK_R, BLOCK_D // PADDED, PADDED), tl.int32)
    for i in tl.static_range(GROUP):
        other = tl.sum(tl.where(slot == i, keys, 0), axis=2)[:, :, None]
        rank += ((other > keys) | ((other == keys) & (i < slot))).to(tl.int32)
    return tl.reshape((rank < n) & (keys > 0), (BLOCK_R, BLOCK_D))
