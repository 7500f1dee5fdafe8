"""Select the k best scores of a row, or n of every group, exactly, in device functions.

Scores are compared through 32-bit unsigned keys, which have the same order:

    key(x) < key(y)  iff  x < y;    key(-0.0) = key(+0.0);    key(NaN) = NAN_KEY, above all;    0 = no entry

A search for a row's k-th best key counts how many keys reach a threshold, until a threshold separates exactly k entries
or only ties are left. It starts from the lowest and the highest key (`key_range`), or from a threshold that was right
for similar scores (`bracket`):

- While one end of the bracket is unknown, the threshold moves away from the known end in steps that grow fourfold.
- Between two known ends regula falsi on the count gives the next threshold. The weights of the Illinois method keep
  either end from standing still. After PATIENCE passes the search bisects, so there are never many passes.
- Once the count at an end differs from k by one, that one key is looked up, and the search is done.

A pass is one reduction over the row: a count, or a look-up. On the scores of SmolLM2-135M a search from the last step's
threshold takes 4 to 5 passes, a search from the range of the keys 8 to 9, and bisection on the bits 16 to 17 (counted
once, by a script that is gone). No search takes more than 50. A count costs a comparison for each entry, and one sum.
Radix selection by 4 bits would take 8 passes, each with 15 sums, or with a histogram in shared memory and an atomic for
each entry. Only a row with a tie at its k-th key needs the running count that gives the tie to the lower index.
"""

import triton
import triton.language as tl

from .device import columns

NAN_KEY = tl.constexpr(0xFFFFFFFF)
INF_KEY = tl.constexpr(0xFF800000)
ZERO_KEY = tl.constexpr(0x80000000)
# The key of -inf, the lowest key of a score.
LEAST_KEY = tl.constexpr(0x007FFFFF)

# After this many passes the search bisects.
PATIENCE = tl.constexpr(16)

# First guess of the distance between two keys of a row of d entries near its threshold: SPREAD / d. An octave of scores
# is 2^23 keys wide, so the guess puts an eighth of the row into an octave.
SPREAD = tl.constexpr(1 << 26)


@triton.jit
def order_key(x):
    """Compute the uint32 key of an fp32 score."""
    bits = x.to(tl.uint32, bitcast=True)
    # -0.0 differs from +0.0 in its sign bit only.
    bits = tl.where(bits == 0x80000000, 0, bits)
    # Setting the sign bit puts positive floats above negative ones. Flipping all bits of negative floats reverses their
    # order.
    key = tl.where(bits < 0x80000000, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, NAN_KEY, key)


@triton.jit
def key_score(key):
    """Compute the fp32 score of a key from LEAST_KEY to INF_KEY: the inverse of `order_key`."""
    bits = tl.where(key >= ZERO_KEY, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def lowest_key(positive):
    """Return the key that candidates must exceed: that of score 0 if only positive scores count, else 0 (no entry)."""
    return tl.where(positive, ZERO_KEY, 0).to(tl.uint32)


@triton.jit
def candidate_key(x, fixed, valid, lowest):
    """Compute the key of score x for a selection.

    A fixed entry has the key of +inf; `fixed` may be None. A key that is not above `lowest` becomes 0, for no entry.
    """
    key = order_key(x)
    if fixed is not None:
        # NaN is an error at a fixed entry as well, so it keeps its key.
        key = tl.where(fixed & (key != NAN_KEY), INF_KEY, key)
    return tl.where(valid & (key > lowest), key, 0)


@triton.jit
def load_keys(
    score, fixed, start, d, valid_r, stride_sd, stride_fd, lowest,
    GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load one chunk as keys (BLOCK_R, BLOCK_D); `score` and `fixed` point at the first column of the tile's rows.

    If `lowest` is None, `score` holds the bits of keys in place of scores.
    """
    # A group is within one thread, since its members are compared with each other.
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
    """Load the budgets (BLOCK_R,) of the tile's rows: the number k for all, or the numbers at k + row * stride_k."""
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
    """Count the entries of each row with a key >= T.

    `keys` has the first SEARCH_D columns. Unless they are the WHOLE row, the other columns are loaded.
    """
    n = tl.sum((keys >= T[:, None]).to(tl.int32), axis=1)
    if not WHOLE:
        for start in range(SEARCH_D, d, SEARCH_D):
            others = load_keys(score, fixed, start, d, valid_r, stride_sd, stride_fd, lowest, 0, 0, SEARCH_D)
            n += tl.sum((others >= T[:, None]).to(tl.int32), axis=1)
    return n


@triton.jit
def highest_below(
    bound, flip, keys, score, fixed, d, valid_r, stride_sd, stride_fd, lowest,
    WHOLE: tl.constexpr, SEARCH_D: tl.constexpr,
):  # fmt: skip
    """Find in each row the highest of the keys ^ flip below `bound`; other arguments as in `count_reaching`."""
    turned = keys ^ flip[:, None]
    best = tl.max(tl.where(turned < bound[:, None], turned, 0), axis=1)
    if not WHOLE:
        for start in range(SEARCH_D, d, SEARCH_D):
            others = load_keys(score, fixed, start, d, valid_r, stride_sd, stride_fd, lowest, 0, 0, SEARCH_D)
            turned = others ^ flip[:, None]
            best = tl.maximum(best, tl.max(tl.where(turned < bound[:, None], turned, 0), axis=1))
    return best


@triton.jit
def key_range(
    keys, k, score, fixed, d, valid_r, stride_sd, stride_fd, lowest, WHOLE: tl.constexpr, SEARCH_D: tl.constexpr
):  # fmt: skip
    """Make the bracket of all keys of a row for `kth_key`, with its highest key; arguments as in `count_reaching`."""
    n = tl.sum((keys > 0).to(tl.int32), axis=1)
    low = tl.min(tl.where(keys > 0, keys, NAN_KEY), axis=1)
    high = tl.max(keys, axis=1)
    if not WHOLE:
        for start in range(SEARCH_D, d, SEARCH_D):
            others = load_keys(score, fixed, start, d, valid_r, stride_sd, stride_fd, lowest, 0, 0, SEARCH_D)
            n += tl.sum((others > 0).to(tl.int32), axis=1)
            low = tl.minimum(low, tl.min(tl.where(others > 0, others, NAN_KEY), axis=1))
            high = tl.maximum(high, tl.max(others, axis=1))
    # A row with fewer than k entries keeps them all.
    return low, n, tl.minimum(high, NAN_KEY - 1) + 1, tl.zeros_like(n), tl.minimum(k, n), high


@triton.jit
def bracket(
    start, least, k, keys, score, fixed, d, valid_r, stride_sd, stride_fd, lowest,
    WHOLE: tl.constexpr, SEARCH_D: tl.constexpr,
):  # fmt: skip
    """Make the bracket on one side of a threshold for `kth_key`, by one count.

    Args:
        start: (BLOCK_R,) uint32, the threshold, which may be any number.
        least: uint32, a key that every entry reaches.
        k: (BLOCK_R,) int32, number of entries to keep.
        keys and all others: as in `count_reaching`.
    """
    reach = tl.minimum(tl.maximum(start, tl.maximum(least, LEAST_KEY)), INF_KEY)
    m = count_reaching(reach, keys, score, fixed, d, valid_r, stride_sd, stride_fd, lowest, WHOLE, SEARCH_D)
    rises = m >= k
    T = tl.where(rises, reach, tl.maximum(least, LEAST_KEY))
    top = tl.where(rises, INF_KEY + 1, reach).to(tl.uint32)
    return T, tl.where(rises, m, 0), top, tl.where(rises, -1, m)


@triton.jit
def kth_key(
    T, n, top, n_top, keys, k, score, fixed, d, valid_r, stride_sd, stride_fd, lowest,
    WHOLE: tl.constexpr, SEARCH_D: tl.constexpr,
):  # fmt: skip
    """Find in each row a threshold T that at least k keys reach, and the number of keys equal to T to keep.

    Args:
        T, n, top, n_top: (BLOCK_R,), the bracket: n >= k keys reach T, and n_top < k keys reach `top`. If n is 0, every
            entry reaches T, and their number is unknown. If n_top is -1, no key reaches `top`, which was not counted.
        k: (BLOCK_R,) int32, number of entries to keep; a row with fewer entries keeps all.
        keys and all others: as in `count_reaching`.

    Returns:
        T (BLOCK_R,) uint32: keys above T are kept;
        ties_kept (BLOCK_R,) int32: of the keys equal to T the first `ties_kept` are kept;
        tied: whether a row of the tile must leave out keys equal to T.
    """
    # Weight of the end that did not move last time. It is halved each time that the end stays again.
    weight = tl.zeros_like(n).to(tl.float32) + 1.0
    rose = n_top < 0
    stride = tl.zeros_like(n).to(tl.float32)
    made = 0
    running = (n != k) & (top - T > (n > 0).to(tl.uint32))
    while tl.max(running.to(tl.int32), axis=0) > 0:
        surplus = tl.maximum(n - k, 0).to(tl.float32)
        shortage = (k - n_top).to(tl.float32)
        # With one end known, move away from it.
        stride = tl.maximum(4 * stride, tl.where(n == 0, shortage, surplus) * (SPREAD / d))
        stride = tl.minimum(stride, 2147483648.0)
        jump = tl.minimum(stride.to(tl.uint32), top - T)
        # With both ends known, go between them.
        surplus *= tl.where(rose, 1.0, weight)
        shortage *= tl.where(rose, weight, 1.0)
        share = tl.where(made < PATIENCE, surplus / tl.maximum(surplus + shortage, 1e-30), 0.5)
        between = T + ((top - T).to(tl.float32) * share).to(tl.uint32)
        reach = tl.where(n == 0, top - jump, tl.where(n_top < 0, T + jump, between))
        reach = tl.minimum(tl.maximum(reach, T + (n > 0).to(tl.uint32)), top - 1)
        # With a count that differs from k by one, look the key up.
        drops = running & (n == k + 1)
        adds = running & (n_top == k - 1) & (n != k + 1)
        if tl.max((drops | adds).to(tl.int32), axis=0) > 0:
            # The lowest key from T upwards is the highest of the flipped keys.
            flip = tl.where(drops, NAN_KEY, 0).to(tl.uint32)
            bound = tl.where(drops, (T ^ NAN_KEY) + 1, top)
            nearest = flip ^ highest_below(
                bound, flip, keys, score, fixed, d, valid_r, stride_sd, stride_fd, lowest, WHOLE, SEARCH_D
            )
            # NaN is outside the bracket, and so may be the key that is found in a row with fewer than k entries.
            nearest = tl.minimum(tl.maximum(nearest, T), top - 1)
            T = tl.where(drops, nearest, T)
            top = tl.where(adds, nearest + 1, top)
            reach = tl.where(drops, nearest + 1, tl.where(adds, nearest, reach))
        made += 1
        m = count_reaching(reach, keys, score, fixed, d, valid_r, stride_sd, stride_fd, lowest, WHOLE, SEARCH_D)
        rises = m >= k
        weight = tl.where(rises == rose, 0.5 * weight, 1.0)
        rose = rises
        T = tl.where(running & rises, reach, T)
        n = tl.where(running & rises, m, n)
        top = tl.where(running & (rises == 0), reach, top)
        n_top = tl.where(running & (rises == 0), m, n_top)
        running = (n != k) & (top - T > (n > 0).to(tl.uint32))
    # Now a row with n > k has no key between T and top: n - n_top keys are equal to T.
    tied = tl.max(n - k, axis=0) > 0
    ties_kept = tl.where(n > k, k - tl.maximum(n_top, 0), 0x7FFFFFFF)
    return T, ties_kept, tied


@triton.jit
def take(keys, T, ties_kept, tied, passed):
    """Choose the kept entries of one chunk; also returns the number of ties so far, `passed`, for the next chunk."""
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
    """Choose the n best of every group of a chunk laid out by `columns`: entries that fewer than n others beat."""
    keys = tl.reshape(keys, (BLOCK_R, BLOCK_D // PADDED, PADDED))
    slot = tl.arange(0, PADDED)[None, None, :]
    rank = tl.zeros((BLOCK_R, BLOCK_D // PADDED, PADDED), tl.int32)
    for i in tl.static_range(GROUP):
        other = tl.sum(tl.where(slot == i, keys, 0), axis=2)[:, :, None]
        rank += ((other > keys) | ((other == keys) & (i < slot))).to(tl.int32)
    return tl.reshape((rank < n) & (keys > 0), (BLOCK_R, BLOCK_D))
