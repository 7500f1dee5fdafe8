// The loops of packed.cpp for one level of instructions, included in a namespace that has
//
// lanes           a vector of fp32 sums
// group, bits     some weights, and as many bits of the mask
// spread          the next weights, with zeros where a bit is not set
// number, add     the dtype in which x is multiplied; sums + weights * x
// ROWS, COLUMNS   the rows of a tile of W, and those of x, whose sums lie in registers at once

constexpr int GROUP = 8 * sizeof(bits);

// The next GROUP weights. `values` and `mask` move behind what was taken.
template <int AHEAD, class V> INLINE group expand(const V *&values, const uint8_t *&mask) {
    __builtin_prefetch((const char *)values + AHEAD);
    bits kept;
    std::memcpy(&kept, mask, sizeof kept);
    group out = spread(values, kept);
    mask += sizeof kept;
    values += __builtin_popcount(kept);
    return out;
}

// Sums of B rows of x (B, cols) with one row of W.
template <int B, class V> void dot(const V *values, const uint8_t *mask, const number *x, int64_t cols, float *out) {
    constexpr int CHAINS = FEW / B;
    lanes sums[CHAINS][B] = {};
    int64_t c = 0;
    while (c < cols)
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++, c += GROUP) {
            if (c == cols) break;
            group w = expand<FAR>(values, mask);
            for (int b = 0; b < B; b++) sums[chain][b] = add(sums[chain][b], w, x + b * cols + c);
        }
    for (int b = 0; b < B; b++) {
        for (int chain = 1; chain < CHAINS; chain++) sums[0][b] += sums[chain][b];
        out[b] = total(sums[0][b]);
    }
}

// Rows first to last of W with x (batch, cols), batch <= FEW.
template <class V, class Y>
void few(const Packed<V> &W, const number *x, int64_t batch, int64_t first, int64_t last, Y *y) {
    constexpr auto DOTS = std::array{dot<1, V>, dot<2, V>, dot<3, V>, dot<4, V>};
    std::vector<V> copy;
    float out[FEW];
    for (int64_t r = first; r < last; r++) {
        DOTS[batch - 1](W.row(r, copy), W.bits(r), x, W.cols, out);
        for (int64_t b = 0; b < batch; b++) narrow(out[b], y[b * W.rows + r]);
    }
}

// Rows first to last of W with x (cols / TILE, MOST, TILE).
template <class V, class Y>
void many(const Packed<V> &W, const number *x, int64_t batch, int64_t first, int64_t last, Y *y) {
    std::vector<V> copies[ROWS];
    alignas(64) number tile[ROWS][TILE] = {};
    for (int64_t r = first; r < last; r += ROWS) {
        int rows = std::min<int64_t>(ROWS, last - r);
        const V *values[ROWS];
        for (int i = 0; i < rows; i++) values[i] = W.row(r + i, copies[i]);
        lanes sums[MOST][ROWS] = {};
        for (int64_t c = 0; c < W.cols; c += TILE) {
            int64_t width = std::min(TILE, W.cols - c);
            for (int i = 0; i < rows; i++) {
                const uint8_t *mask = W.bits(r + i) + c / 8;
                for (int64_t j = 0; j < width; j += GROUP) *(group *)&tile[i][j] = expand<NEAR>(values[i], mask);
            }
            for (int64_t b = 0; b < batch; b += COLUMNS) {
                lanes local[COLUMNS][ROWS];
                std::memcpy(local, sums + b, sizeof local);
                for (int64_t j = 0; j < width; j += GROUP)
                    for (int i = 0; i < COLUMNS; i++)
                        for (int k = 0; k < ROWS; k++)
                            local[i][k] = add(local[i][k], *(group *)&tile[k][j], x + c * MOST + (b + i) * TILE + j);
                std::memcpy(sums + b, local, sizeof local);
            }
        }
        for (int64_t b = 0; b < batch; b++)
            for (int i = 0; i < rows; i++) narrow(total(sums[b][i]), y[b * W.rows + r + i]);
    }
}

// Rows first to last of W with zeros, (last - first, cols).
template <class V> void unpack(const Packed<V> &W, int64_t first, int64_t last, V *out) {
    std::vector<V> copy;
    for (int64_t r = first; r < last; r++) {
        const V *values = W.row(r, copy);
        const uint8_t *mask = W.bits(r);
        for (int64_t c = 0; c < W.cols; c += GROUP, out += GROUP) {
            group w = expand<FAR>(values, mask);
            for (int i = 0; i < GROUP; i++) narrow(w[i], out[i]);
        }
    }
}
