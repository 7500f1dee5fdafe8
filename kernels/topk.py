"""Device functions that select the k best scores of a row, or n of every group, exactly.

They compare 32-bit unsigned keys, which have the same order as the scores:

    key(x) < key(y)  iff  x < y;    key(-0.0) = key(+0.0);    key(NaN) = NAN_KEY, above all;    0 = no entry

A key reaches a threshold if it is at least as high. A search for a row's k-th best key counts the keys that reach a
threshold, and changes the threshold until exactly k keys reach it, or only equal keys are left. The bracket of a search
has two ends: a threshold that at least k keys reach, and a higher threshold that fewer keys reach. A search starts from
the lowest and the highest key (`key_range`), or from a threshold that was right for similar scores (`bracket`):

- While the count at one end of the bracket is unknown, thresholds move away from the other end in steps that grow
  fourfold.
- Between ends with known counts, regula falsi on the counts gives the next threshold. The weights of the Illinois
  method keep either end from standing still. After PATIENCE passes the search bisects, so there are never many passes.
- Once the count at an end differs from k by one, a look-up of the next key ends the search.

A pass is one reduction over the row: a count, or a look-up. On the scores of SmolLM2-135M a search takes 4 to 5 passes
from the threshold of the last step, and 8 to 9 from the range of the keys. Bisection on the bits takes 16 to 17
(counted once, by a script that is gone). No search takes more than 50. A count costs a comparison for each entry, and
one sum. Radix selection by 4 bits would take 8 passes, each with 15 sums, or with a histogram in shared memory and an
atomic for each entry. Only a row with several keys equal to its k-th key needs a running count, which gives ties to the
lower index.
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

# Two neighbouring keys of a row near its threshold are expected to differ by SPREAD / d, with d entries in the row. The
# scores from x to 2 x have 2^23 keys, so an eighth of the row is expected among them.
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
    """Return the key that candidates must exceed: the key of score 0 if they must be positive, else 0 (no entry)."""
    return tl.where(positive, ZERO_KEY, 0).to(tl.uint32)


@triton.jit
def candidate_key(x, fixed, valid, lowest):
    """Compute the key of score x for a selection.

    A fixed entry has the key of +inf; `fixed` may be None. Keys up to `lowest` become 0, which means no entry.
    """
    key = order_key(x)
    if fixed is not None:
        # NaN is an error at a fixed entry as well, so NaN keeps its key.
        key = tl.where(fixed & (key != NAN_KEY), INF_KEY, key)
    return tl.where(valid & (key > lowest), key, 0)


@triton.jit
def load_keys(scores, start, BLOCK_D: tl.constexpr, GROUP: tl.constexpr = 0, PADDED: tl.constexpr = 0):
    """Load one chunk as keys (BLOCK_R, BLOCK_D).

    Args:
        scores: score, fixed, d, valid_r, stride_sd, stride_fd, lowest. `score` and `fixed` point at the first column of
            the tile's rows. If `lowest` is None, `score` holds keys, as the bits of floats, in place of scores.
        start: first column, counted with the padding of groups.
    """
    score, fixed, d, valid_r, stride_sd, stride_fd, lowest = scores
    # A whole group is in one thread, since all its members are compared with each other.
    column, _, valid = columns(start, d, valid_r, BLOCK_D, GROUP, PADDED, 16 if GROUP else 4)
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
    """Load the budgets (BLOCK_R,) of the tile's rows. `k` is one budget, or with PER_ROW a pointer to the budgets."""
    if PER_ROW:
        budget = tl.load(k + row * stride_k, mask=valid_r, other=0).to(tl.int32)
    else:
        budget = tl.zeros((BLOCK_R,), tl.int32) + k
    return budget


@triton.jit
def count_reaching(threshold, keys, scores, WHOLE: tl.constexpr):
    """Count the entries of each row with a key >= threshold.

    Args:
        threshold: (BLOCK_R,) uint32.
        keys: (BLOCK_R, SEARCH_D) uint32, the keys of the first columns.
        scores: as in `load_keys`, which loads the other columns unless `keys` has WHOLE rows.
    """
    n = tl.sum((keys >= threshold[:, None]).to(tl.int32), axis=1)
    if not WHOLE:
        d = scores[2]
        for start in range(keys.shape[1], d, keys.shape[1]):
            chunk = load_keys(scores, start, keys.shape[1])
            n += tl.sum((chunk >= threshold[:, None]).to(tl.int32), axis=1)
    return n


@triton.jit
def highest_below(bound, flip, keys, scores, WHOLE: tl.constexpr):
    """Find the highest value of `key ^ flip` below `bound` in each row; other arguments as in `count_reaching`."""
    turned = keys ^ flip[:, None]
    best = tl.max(tl.where(turned < bound[:, None], turned, 0), axis=1)
    if not WHOLE:
        d = scores[2]
        for start in range(keys.shape[1], d, keys.shape[1]):
            chunk = load_keys(scores, start, keys.shape[1])
            turned = chunk ^ flip[:, None]
            best = tl.maximum(best, tl.max(tl.where(turned < bound[:, None], turned, 0), axis=1))
    return best


@triton.jit
def key_range(k, keys, scores, WHOLE: tl.constexpr):
    """Return the arguments `ends` and `k` of `kth_key` for all keys of a row, and the highest key."""
    n = tl.sum((keys > 0).to(tl.int32), axis=1)
    low = tl.min(tl.where(keys > 0, keys, NAN_KEY), axis=1)
    high = tl.max(keys, axis=1)
    if not WHOLE:
        d = scores[2]
        for start in range(keys.shape[1], d, keys.shape[1]):
            chunk = load_keys(scores, start, keys.shape[1])
            n += tl.sum((chunk > 0).to(tl.int32), axis=1)
            low = tl.minimum(low, tl.min(tl.where(chunk > 0, chunk, NAN_KEY), axis=1))
            high = tl.maximum(high, tl.max(chunk, axis=1))
    # A row with fewer than k entries keeps all of them.
    return (low, n, tl.minimum(high, NAN_KEY - 1) + 1, tl.zeros_like(n)), tl.minimum(k, n), high


@triton.jit
def bracket(start, least, k, keys, scores, WHOLE: tl.constexpr):
    """Return the argument `ends` of `kth_key`, after one count: a guess is one end.

    Args:
        start: (BLOCK_R,) uint32, the guess of the threshold; it may be any key.
        least: uint32, a key that every entry reaches.
        k: (BLOCK_R,) int32, number of entries to keep.
        keys, scores, WHOLE: as in `count_reaching`.
    """
    reach = tl.minimum(tl.maximum(start, tl.maximum(least, LEAST_KEY)), INF_KEY)
    m = count_reaching(reach, keys, scores, WHOLE)
    rises = m >= k
    threshold = tl.where(rises, reach, tl.maximum(least, LEAST_KEY))
    top = tl.where(rises, INF_KEY + 1, reach).to(tl.uint32)
    return threshold, tl.where(rises, m, 0), top, tl.where(rises, -1, m)


@triton.jit
def kth_key(ends, k, keys, scores, WHOLE: tl.constexpr):
    """Find in each row the threshold above which all keys are kept, and how many keys equal to it are kept.

    Args:
        ends: (threshold, n, top, n_top), (BLOCK_R,) each, the bracket: n >= k keys reach `threshold`, and n_top < k
            keys reach `top`. n = 0 means that every entry reaches `threshold`, but their number is unknown. n_top = -1
            means that no key reaches `top`, and that the search has made no count there.
        k: (BLOCK_R,) int32, number of entries to keep. A row with fewer entries keeps all of them.
        keys, scores, WHOLE: as in `count_reaching`.

    Returns:
        threshold (BLOCK_R,) uint32: keys above the threshold are kept;
        ties_kept (BLOCK_R,) int32: of the keys equal to the threshold, this number is kept, from the lowest index on;
        tied: whether a row of the tile must remove keys equal to its threshold.
    """
    threshold, n, top, n_top = ends
    d = scores[2]
    # Weight of the end that did not move in the last pass. It is halved whenever this end does not move again.
    weight = tl.zeros_like(n).to(tl.float32) + 1.0
    rose = n_top < 0
    stride = tl.zeros_like(n).to(tl.float32)
    made = 0
    running = (n != k) & (top - threshold > (n > 0).to(tl.uint32))
    while tl.max(running.to(tl.int32), axis=0) > 0:
        surplus = tl.maximum(n - k, 0).to(tl.float32)
        shortage = (k - n_top).to(tl.float32)
        # If the count at only one end is known, move away from this end.
        stride = tl.maximum(4 * stride, tl.where(n == 0, shortage, surplus) * (SPREAD / d))
        stride = tl.minimum(stride, 2147483648.0)
        jump = tl.minimum(stride.to(tl.uint32), top - threshold)
        # If the counts at both ends are known, choose a threshold between them.
        surplus *= tl.where(rose, 1.0, weight)
        shortage *= tl.where(rose, weight, 1.0)
        share = tl.where(made < PATIENCE, surplus / tl.maximum(surplus + shortage, 1e-30), 0.5)
        between = threshold + ((top - threshold).to(tl.float32) * share).to(tl.uint32)
        reach = tl.where(n == 0, top - jump, tl.where(n_top < 0, threshold + jump, between))
        reach = tl.minimum(tl.maximum(reach, threshold + (n > 0).to(tl.uint32)), top - 1)
        # If the count at an end differs from k by one, look the next key up.
        drops = running & (n == k + 1)
        adds = running & (n_top == k - 1) & (n != k + 1)
        if tl.max((drops | adds).to(tl.int32), axis=0) > 0:
            # The lowest key that reaches the threshold is the highest of the flipped keys.
            flip = tl.where(drops, NAN_KEY, 0).to(tl.uint32)
            bound = tl.where(drops, (threshold ^ NAN_KEY) + 1, top)
            nearest = flip ^ highest_below(bound, flip, keys, scores, WHOLE)
            # The key may be outside the bracket, if it is NaN, or if the row has fewer than k entries.
            nearest = tl.minimum(tl.maximum(nearest, threshold), top - 1)
            threshold = tl.where(drops, nearest, threshold)
            top = tl.where(adds, nearest + 1, top)
            reach = tl.where(drops, nearest + 1, tl.where(adds, nearest, reach))
        made += 1
        m = count_reaching(reach, keys, scores, WHOLE)
        rises = m >= k
        weight = tl.where(rises == rose, 0.5 * weight, 1.0)
        rose = rises
        threshold = tl.where(running & rises, reach, threshold)
        n = tl.where(running & rises, m, n)
        top = tl.where(running & (rises == 0), reach, top)
        n_top = tl.where(running & (rises == 0), m, n_top)
        running = (n != k) & (top - threshold > (n > 0).to(tl.uint32))
    # Now a row with n > k has no key between `threshold` and `top`: n - n_top keys are equal to `threshold`.
    tied = tl.max(n - k, axis=0) > 0
    ties_kept = tl.where(n > k, k - tl.maximum(n_top, 0), 0x7FFFFFFF)
    return threshold, ties_kept, tied


@triton.jit
def take(keys, threshold, ties_kept, tied, passed):
    """Choose the kept entries of one chunk; also return `passed`, the number of ties so far, for the next chunk."""
    chosen = keys >= threshold[:, None]
    if tied:
        tie = (keys == threshold[:, None]).to(tl.int32)
        chosen = chosen & ((tie == 0) | (passed[:, None] + tl.cumsum(tie, axis=1) <= ties_kept[:, None]))
        passed += tl.sum(tie, axis=1)
    return chosen, passed


@triton.jit
def take_of_groups(
    keys, n, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Choose the n best entries of every group of a chunk, which `columns` has padded.

    An entry is chosen if fewer than n entries of its group are better.
    """
    keys = tl.reshape(keys, (BLOCK_R, BLOCK_D // PADDED, PADDED))
    slot = tl.arange(0, PADDED)[None, None, :]
    rank = tl.zeros((BLOCK_R, BLOCK_D // PADDED, PADDED), tl.int32)
    for i in tl.static_range(GROUP):
        other = tl.sum(tl.where(slot == i, keys, 0), axis=2)[:, :, None]
        rank += ((other > keys) | ((other == keys) & (i < slot))).to(tl.int32)
    return tl.reshape((rank < n) & (keys > 0), (BLOCK_R, BLOCK_D))
