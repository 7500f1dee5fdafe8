// Products with packed matrices on a CPU, y = x W^T, and their expansion. W keeps some of the weights of every row:
//
// values                  the kept weights, row by row, in the order of their columns
// mask (rows, cols / 8)   bit c % 8 of byte c / 8 is set where column c is kept; cols is a multiple of 32
//
// A weight at 60 % takes 0.8 + 0.125 bytes in bf16, of 2 in a dense matrix, and each is read once. Up to FEW rows of x
// multiply a group of weights right after it is expanded into a register. More rows share a tile of W that is expanded
// into the first-level cache. Sums are made in fp32. Their order depends on the number of rows of x and on the processor,
// not on the number of threads.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

// Levels of instructions are chosen when it runs, by a pragma that only GCC has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LEVELS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// Rows of x in one call at most, and those that are multiplied without a tile. Columns of a tile.
constexpr int64_t MOST = 16, FEW = 4, TILE = 512;
// Bytes by which values are fetched ahead, where rows are read one after the other and where they are read in turns.
// The memory's own prefetching follows too slowly.
constexpr int FAR = 2048, NEAR = 512;
// Bytes behind a row's values that are read beside them.
constexpr int64_t BEHIND = 64;

struct bf16 {
    uint16_t bits;
};

INLINE float widen(float v) { return v; }
INLINE float widen(bf16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
INLINE void narrow(float v, float &out) { out = v; }
INLINE void narrow(float v, bf16 &out) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    // To the nearest, ties to even. A NaN stays one.
    out.bits = v != v ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The sum of a vector's lanes.
template <class Lanes> INLINE float total(Lanes v) {
    for (int half = sizeof v / 8; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

// A packed matrix. Row r is values[starts[r]] to values[starts[r + 1]], or the r-th k values where starts is null.
template <class V> struct Packed {
    const V *values;
    const uint8_t *mask;
    const int64_t *starts;
    int64_t rows, cols, k;

    int64_t start(int64_t r) const { return starts ? starts[r] : r * k; }
    const uint8_t *bits(int64_t r) const { return mask + r * cols / 8; }

    // The values of a row. Those at the end of the memory are copied to where bytes BEHIND them may be read.
    const V *row(int64_t r, std::vector<V> &copy) const {
        if ((start(rows) - start(r + 1)) * int64_t(sizeof(V)) >= BEHIND) return values + start(r);
        copy.assign(values + start(r), values + start(r + 1));
        copy.resize(copy.size() + BEHIND);
        return copy.data();
    }
};

namespace portable {
constexpr int ROWS = 2, COLUMNS = 2;
typedef float lanes __attribute__((vector_size(32), aligned(4)));
typedef lanes group;
typedef uint8_t bits;
typedef float number;
template <class V> INLINE group spread(const V *values, bits kept) {
    group out;
    for (int c = 0; c < 8; c++) out[c] = kept >> c & 1 ? widen(*values++) : 0.0f;
    return out;
}
INLINE lanes add(lanes sums, group w, const float *x) { return sums + w * *(const lanes *)x; }
#include "packed_loops.h"
}  // namespace portable

#ifdef LEVELS
// For each byte of a mask, which of the next values each of 8 lanes takes: the bytes of a bf16 in the upper half of its
// lane, and the index of a fp32. Lanes that are not kept have the top bit set, for which `vpshufb` gives zero.
struct Tables {
    alignas(32) uint8_t halves[256][32];
    alignas(32) int32_t whole[256][8];
    Tables() {
        for (int byte = 0; byte < 256; byte++)
            for (int c = 0, rank = 0; c < 8; rank += byte >> c++ & 1) {
                bool kept = byte >> c & 1;
                for (int b = 0; b < 4; b++) halves[byte][4 * c + b] = kept && b > 1 ? 2 * rank + b - 2 : 0x80;
                whole[byte][c] = kept ? rank : -1;
            }
    }
};
const Tables TABLES;

#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
namespace avx2 {
constexpr int ROWS = 4, COLUMNS = 2;
typedef float lanes __attribute__((vector_size(32), aligned(4)));
typedef lanes group;
typedef uint8_t bits;
typedef float number;
INLINE group spread(const bf16 *values, bits kept) {
    __m256i next = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
    return (group)_mm256_shuffle_epi8(next, *(const __m256i *)TABLES.halves[kept]);
}
INLINE group spread(const float *values, bits kept) {
    __m256i lane = *(const __m256i *)TABLES.whole[kept];
    __m256i next = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)values), lane);
    return (group)_mm256_andnot_si256(_mm256_srai_epi32(lane, 31), next);
}
INLINE lanes add(lanes sums, group w, const float *x) { return sums + w * *(const lanes *)x; }
#include "packed_loops.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,popcnt")
namespace avx512 {
constexpr int ROWS = 4, COLUMNS = 4;
typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef lanes group;
typedef uint16_t bits;
typedef float number;
INLINE group spread(const bf16 *values, bits kept) {
    __m256i next = _mm256_maskz_expand_epi16(kept, _mm256_loadu_si256((const __m256i *)values));
    return (group)_mm512_slli_epi32(_mm512_cvtepu16_epi32(next), 16);
}
INLINE group spread(const float *values, bits kept) {
    return (group)_mm512_maskz_expand_epi32(kept, _mm512_loadu_si512(values));
}
INLINE lanes add(lanes sums, group w, const float *x) { return sums + w * *(const lanes *)x; }
#include "packed_loops.h"
}  // namespace avx512
#pragma GCC pop_options

// bf16 by bf16: a lane of a sum adds two products.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,amx-tile,amx-bf16,popcnt")
namespace pairs {
constexpr int ROWS = 4, COLUMNS = 4;
typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef __m512i group;
typedef uint32_t bits;
typedef bf16 number;
INLINE group spread(const bf16 *values, bits kept) {
    return _mm512_maskz_expand_epi16(kept, _mm512_loadu_si512(values));
}
INLINE lanes add(lanes sums, group w, const bf16 *x) {
    return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
}
#include "packed_loops.h"

// 16 rows of W at a time with 16 rows of x. x (cols / 32, 16, 16, 2): for 32 columns, pairs of them, of each row.
template <class Y> void amx(const Packed<bf16> &W, const bf16 *x, int64_t batch, int64_t first, int64_t last, Y *y) {
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    } shapes;
    _tile_loadconfig(&shapes);
    // Narrow: the next columns are expanded while these are multiplied.
    constexpr int64_t WIDTH = 128;
    std::vector<bf16> copies[16];
    alignas(64) bf16 tile[16][WIDTH] = {};
    alignas(64) float sums[2][16][16];
    for (int64_t r = first; r < last; r += 16) {
        int rows = std::min<int64_t>(16, last - r);
        const bf16 *values[16];
        for (int i = 0; i < rows; i++) values[i] = W.row(r + i, copies[i]);
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t c = 0; c < W.cols; c += WIDTH) {
            int64_t width = std::min(WIDTH, W.cols - c);
            for (int i = 0; i < rows; i++) {
                const uint8_t *mask = W.bits(r + i) + c / 8;
                for (int64_t j = 0; j < width; j += 32) _mm512_store_si512(&tile[i][j], expand<NEAR>(values[i], mask));
            }
            // Two sums, since one product waits for the one before it.
            for (int64_t j = 0; j < width; j += 64) {
                _tile_loadd(2, &tile[0][j], WIDTH * 2);
                _tile_loadd(3, x + (c + j) * 16, 64);
                _tile_dpbf16ps(0, 2, 3);
                if (j + 32 == width) break;
                _tile_loadd(4, &tile[0][j + 32], WIDTH * 2);
                _tile_loadd(5, x + (c + j + 32) * 16, 64);
                _tile_dpbf16ps(1, 4, 5);
            }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        for (int i = 0; i < rows; i++)
            for (int64_t b = 0; b < batch; b++) narrow(sums[0][i][b] + sums[1][i][b], y[b * W.rows + r + i]);
    }
    _tile_release();
}
}  // namespace pairs
#pragma GCC pop_options
#endif

enum Level { PORTABLE, AVX2, AVX512, PAIRS, AMX };

#ifdef LEVELS
#define AT(level, call) (level >= AVX512 ? avx512::call : level == AVX2 ? avx2::call : portable::call)
#else
#define AT(level, call) portable::call
#endif

// Calls work(first, last) for parts of the rows, each a multiple of 16 but the last one.
template <class Work> void parts(int threads, int64_t rows, Work work) {
    int64_t size = std::max<int64_t>(rows / (threads * 4) / 16 * 16, 16);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t first = 0; first < rows; first += size) work(first, std::min(first + size, rows));
}

// x (batch, cols) with another order of its numbers: that of (b, c) is out[place(b, c)].
template <class To, class X, class Place>
std::vector<To> arrange(const X *x, int64_t batch, int64_t cols, int64_t size, Place place) {
    std::vector<To> out(size);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t c = 0; c < cols; c++) {
            if constexpr (std::is_same_v<To, X>) out[place(b, c)] = x[b * cols + c];
            else out[place(b, c)] = widen(x[b * cols + c]);
        }
    return out;
}

template <class V, class X>
void product(int level, int threads, const Packed<V> &W, const X *x, int64_t batch, X *y) {
    auto rows = [cols = W.cols](int64_t b, int64_t c) { return b * cols + c; };
    auto tiles = [](int64_t b, int64_t c) { return (c / TILE * MOST + b) * TILE + c % TILE; };
    int64_t tiled = MOST * ((W.cols + TILE - 1) / TILE * TILE);
#ifdef LEVELS
    if constexpr (std::is_same_v<V, bf16> && std::is_same_v<X, bf16>) {
        if (level >= PAIRS && batch <= FEW)
            return parts(threads, W.rows, [&](int64_t a, int64_t b) { pairs::few(W, x, batch, a, b, y); });
        if (level == PAIRS) {
            auto in = arrange<bf16>(x, batch, W.cols, tiled, tiles);
            return parts(threads, W.rows, [&](int64_t a, int64_t b) { pairs::many(W, in.data(), batch, a, b, y); });
        }
        if (level == AMX) {
            auto place = [](int64_t b, int64_t c) { return c / 2 * 32 + b * 2 + c % 2; };
            auto in = arrange<bf16>(x, batch, W.cols, W.cols * 16, place);
            return parts(threads, W.rows, [&](int64_t a, int64_t b) { pairs::amx(W, in.data(), batch, a, b, y); });
        }
    }
#endif
    auto in = batch <= FEW ? arrange<float>(x, batch, W.cols, batch * W.cols, rows)
                           : arrange<float>(x, batch, W.cols, tiled, tiles);
    parts(threads, W.rows, [&](int64_t a, int64_t b) {
        if (batch <= FEW) AT(level, few(W, in.data(), batch, a, b, y));
        else AT(level, many(W, in.data(), batch, a, b, y));
    });
}

}  // namespace

extern "C" {

// The best level that this processor has.
int packed_level() {
#ifdef LEVELS
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PORTABLE;
    if (!__builtin_cpu_supports("avx512vbmi2") || !__builtin_cpu_supports("avx512vl")) return AVX2;
    if (!__builtin_cpu_supports("avx512bf16")) return AVX512;
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    // Bits 22 and 24: AMX in bf16, and its tiles. Linux gives their registers to who asks for them (ARCH_REQ_XCOMP_PERM).
    return d >> 22 & d >> 24 & 1 && syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? AMX : PAIRS;
#else
    return PORTABLE;
#endif
}

// y (batch, rows) = x (batch, cols) W^T, batch <= 16. x and y have one dtype: bf16, or else fp32. So have the values.
void packed_product(
    int level, int threads, int half_x, const void *x, int64_t batch, int half_values, const void *values,
    const uint8_t *mask, const int64_t *starts, int64_t rows, int64_t cols, int64_t k, void *y
) {
    auto with = [&](auto *v, auto *in) {
        Packed<std::decay_t<decltype(*v)>> W{v, mask, starts, rows, cols, k};
        product(level, threads, W, in, batch, (std::decay_t<decltype(*in)> *)y);
    };
    auto with_values = [&](auto *v) { half_x ? with(v, (const bf16 *)x) : with(v, (const float *)x); };
    half_values ? with_values((const bf16 *)values) : with_values((const float *)values);
}

// Rows first to last of W with zeros, (last - first, cols) in the dtype of the values.
void packed_unpack(
    int level, int threads, int half_values, const void *values, const uint8_t *mask, const int64_t *starts,
    int64_t rows, int64_t cols, int64_t k, int64_t first, int64_t last, void *out
) {
    auto with = [&](auto *v, auto *to) {
        Packed<std::decay_t<decltype(*v)>> W{v, mask, starts, rows, cols, k};
        parts(threads, last - first, [&](int64_t a, int64_t b) {
            AT(level, unpack(W, first + a, first + b, to + a * cols));
        });
    };
    half_values ? with((const bf16 *)values, (bf16 *)out) : with((const float *)values, (float *)out);
}
}
