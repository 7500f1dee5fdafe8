// Selection of the k best scores of every row, or of every group of a row, on a CPU; exact, as in selection.py.
//
// A row's scores become keys, integers in the order of the scores, that stay in the first-level cache. The k-th key is
// found by counting: a sample brackets it, and each count moves one end of the bracket.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

// Levels of instructions, by their numbers in packed.cpp, are chosen when it runs, as only GCC can.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LEVELS
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// The keys of infinity and of all NaN, which count as the highest scores, but are not kept.
constexpr int32_t INF = 0x7f800000, NONE = INF + 1;
// Keys in a sample at least. Groups in a block.
constexpr int64_t SAMPLE = 64, GROUPS = 64;
// Counts that interpolate. Later ones halve the bracket, whatever the scores.
constexpr int PATIENCE = 12;

// The arguments of a call. Matrices have strides in entries from row to row.
struct Call {
    const float *score;
    const uint8_t *fixed;
    uint8_t *out;
    const int64_t *budgets;
    int64_t score_stride, fixed_stride, out_stride, k, rows, d, group;
    int positive;
};

// The length of a row of keys, padded by keys below all others. Its quarters consist of whole registers.
INLINE int64_t padded(int64_t d) { return (d + 63) / 64 * 64; }

// The size of a sample.
INLINE int64_t sampled(int64_t d) { return std::max(SAMPLE, d / 256); }

// The number of keys that reach `least`. The quarters of a row are counted at once: the sums do not wait for each other.
INLINE int64_t count(const int32_t *keys, int64_t quarter, int32_t least) {
    int32_t a = 0, b = 0, c = 0, d = 0;
    for (int64_t i = 0; i < quarter; i++) {
        a += keys[i] >= least;
        b += keys[i + quarter] >= least;
        c += keys[i + 2 * quarter] >= least;
        d += keys[i + 3 * quarter] >= least;
    }
    return int64_t(a) + b + c + d;
}

// The k-th key of a row or a lower one that k keys reach, and the number of keys equal to it that are kept.
struct Threshold {
    int32_t key;
    int64_t ties;
};

INLINE Threshold kth_key(const int32_t *keys, int64_t d, int64_t k, int32_t least, int32_t most, int32_t *sample) {
    // n_low >= k keys reach `low`, and n_high < k keys reach `high`. The end that did not move weighs less and less.
    int64_t low = least, high = int64_t(most) + 1, n_low = d, n_high = 0;
    double weight_low = 1, weight_high = 1;
    auto move = [&](int64_t key) __attribute__((always_inline)) {
        int64_t n = count(keys, padded(d) / 4, key);
        if (n >= k) low = key, n_low = n, weight_low = 1, weight_high /= 2;
        else high = key, n_high = n, weight_high = 1, weight_low /= 2;
    };
    if (d > SAMPLE) {
        int64_t size = sampled(d), spread = 0.75 * std::sqrt(double(size)), at = k * size / d;
        for (int64_t i = 0; i < size; i++) sample[i] = keys[i * d / size];
        for (int64_t rank : {at + spread, at - spread}) {
            if (rank < 0 || rank >= size) continue;
            std::nth_element(sample, sample + rank, sample + size, std::greater<int32_t>());
            int64_t key = int64_t(sample[rank]) + (rank < at);
            if (low < key && key < high) move(key);
            // The keys before this rank hold those of the next one.
            size = rank;
        }
        weight_low = weight_high = 1;
    }
    for (int made = 0; n_low > k && high - low > 1; made++) {
        double surplus = (n_low - k) * weight_low, shortage = (k - n_high) * weight_high;
        double share = made < PATIENCE ? surplus / (surplus + shortage) : 0.5;
        move(std::clamp(low + int64_t((high - low) * share), low + 1, high - 1));
    }
    return {int32_t(low), n_low > k ? k - n_high : d};
}

// The best scores of one row. `keys` and `sample` are memory for padded(d) and sampled(d) numbers.
INLINE void best_of_row(const Call &call, int64_t row, int32_t *keys, int32_t *sample) {
    const float *score = call.score + row * call.score_stride;
    const uint8_t *fixed = call.fixed ? call.fixed + row * call.fixed_stride : nullptr;
    uint8_t *out = call.out + row * call.out_stride;
    int64_t d = call.d, k = std::min(call.budgets ? call.budgets[row] : call.k, d);
    if (k <= 0) return void(std::memset(out, 0, d));
    int32_t least = NONE, most = INT32_MIN;
    for (int64_t c = 0; c < d; c++) {
        int32_t bits;
        std::memcpy(&bits, score + c, 4);
        // -0 gets the key of +0.
        int32_t sign = bits >> 31, size = bits & INT32_MAX, key = size > INF ? NONE : (size ^ sign) - sign;
        if (fixed) key = std::max(key, fixed[c] ? INF : INT32_MIN);
        keys[c] = key;
        least = std::min(least, key);
        most = std::max(most, key);
    }
    std::fill(keys + d, keys + padded(d), INT32_MIN);
    Threshold found = kth_key(keys, d, k, least, most, sample);
    if (call.positive && found.key < 1) found = {1, d};
    int32_t first = found.key + (found.ties < d);
    for (int64_t c = 0; c < d; c++) out[c] = (keys[c] >= first) & (keys[c] <= INF);
    if (first == found.key || found.key > INF) return;
    // Ties go to the lower index. NaN, which are not kept, leave their places to ties.
    int64_t left = found.ties + count(keys, padded(d) / 4, NONE);
    for (int64_t c = 0; left && c < d; c++)
        if (keys[c] == found.key) out[c] = 1, left--;
}

// The k best of every M scores of one row; M = 0 stands for any number. A NaN is behind the scores after it.
template <int M> INLINE void best_of_groups(const Call &call, int64_t row) {
    const float *score = call.score + row * call.score_stride;
    const uint8_t *fixed = call.fixed ? call.fixed + row * call.fixed_stride : nullptr;
    uint8_t *out = call.out + row * call.out_stride;
    const int m = M ? M : call.group, n = call.k;
    float s[M ? M : 32][GROUPS] = {};
    int32_t rank[M ? M : 32][GROUPS];
    for (int64_t first = 0; first < call.d; first += GROUPS * m) {
        const int64_t groups = std::min(GROUPS, (call.d - first) / m);
        for (int64_t g = 0; g < groups; g++)
            for (int i = 0; i < m; i++) s[i][g] = score[first + g * m + i];
        if (fixed)
            for (int64_t g = 0; g < groups; g++)
                for (int i = 0; i < m; i++)
                    if (fixed[first + g * m + i] && s[i][g] == s[i][g]) s[i][g] = INFINITY;
        std::memset(rank, 0, sizeof rank);
        for (int i = 0; i < m; i++)
            for (int j = i + 1; j < m; j++)
                for (int64_t g = 0; g < GROUPS; g++) {
                    int32_t ahead = s[i][g] >= s[j][g];
                    rank[j][g] += ahead;
                    rank[i][g] += 1 - ahead;
                }
        for (int i = 0; i < m; i++)
            for (int64_t g = 0; g < GROUPS; g++) rank[i][g] = (rank[i][g] < n) & (!call.positive | (s[i][g] > 0));
        for (int64_t g = 0; g < groups; g++)
            for (int i = 0; i < m; i++) out[first + g * m + i] = rank[i][g];
    }
}

INLINE void best(const Call &call, int64_t first, int64_t last) {
    std::vector<int32_t> memory(call.group ? 0 : padded(call.d) + sampled(call.d));
    for (int64_t row = first; row < last; row++) {
        if (call.group == 4) best_of_groups<4>(call, row);
        else if (call.group) best_of_groups<0>(call, row);
        else best_of_row(call, row, memory.data(), memory.data() + padded(call.d));
    }
}

void portable(const Call &call, int64_t first, int64_t last) { best(call, first, last); }
#ifdef LEVELS
__attribute__((target("avx2"))) void avx2(const Call &call, int64_t first, int64_t last) { best(call, first, last); }
__attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512"))) void avx512(const Call &call, int64_t first, int64_t last) {
    best(call, first, last);
}
#endif

}  // namespace

// out (rows, d) = the best scores; see `select` in selection.py. `fixed` and `budgets` may be null.
extern "C" void select_best(
    int level, int threads, const float *score, const uint8_t *fixed, uint8_t *out, const int64_t *budgets,
    int64_t score_stride, int64_t fixed_stride, int64_t out_stride, int64_t k, int64_t rows, int64_t d, int64_t group,
    int positive
) {
    Call call{score, fixed, out, budgets, score_stride, fixed_stride, out_stride, k, rows, d, group, positive};
    auto work = portable;
#ifdef LEVELS
    work = level > 1 ? avx512 : level ? avx2 : portable;
#endif
    int64_t size = std::max<int64_t>((rows + threads - 1) / threads, 1);
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < rows; first += size) work(call, first, std::min(first + size, rows));
}
