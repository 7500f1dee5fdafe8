// The dense twin of kernels/packed.cpp for one row of x: y = W x for bf16, by the same instructions, prefetching and
// threads. bench/runs/packed.py compiles it for the machine and measures it.

#include <cstdint>
#include <immintrin.h>

extern "C" void dense_product(int threads, const uint16_t *x, const float *wide, const uint16_t *W, int64_t rows, int64_t cols, float *y) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 256)
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *w = W + r * cols;
#ifdef __AVX512BF16__
        __m512 sums[4] = {};
        for (int64_t c = 0; c < cols; c += 128)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                _mm_prefetch((const char *)(w + c + 32 * i) + 2048, _MM_HINT_T0);
                __m512bh a = (__m512bh)_mm512_loadu_si512(w + c + 32 * i), b = (__m512bh)_mm512_loadu_si512(x + c + 32 * i);
                sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
            }
        y[r] = _mm512_reduce_add_ps((sums[0] + sums[1]) + (sums[2] + sums[3]));
#else
        __m256 sums[4] = {};
        for (int64_t c = 0; c < cols; c += 32)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                _mm_prefetch((const char *)(w + c + 8 * i) + 2048, _MM_HINT_T0);
                __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(w + c + 8 * i)));
                sums[i] = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(a, 16), _mm256_loadu_ps(wide + c + 8 * i), sums[i]);
            }
        __m256 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        y[r] = 0;
        for (int i = 0; i < 8; i++) y[r] += sum[i];
#endif
    }
}
