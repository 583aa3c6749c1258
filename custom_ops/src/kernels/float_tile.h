// The exact mode: weights dequantized 32 rows at a time, products and sums in float.
#pragma once

#include "kernels/decode.h"
#include "kernels/fused.h"

namespace osl {
namespace OSL_ISA {

// Rows whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int32_t kFloatRows = 8;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int32_t kFloatRows = 4;
#else
constexpr int32_t kFloatRows = 2;
#endif

// sums[kRows][16] += a[32][rows] (from its row `first`) * weights[32][16].
template <int32_t kRows>
static inline void add_products(const float* a, int32_t rows, const float* weights, float* sums) {
    constexpr int32_t kVectors = kStripColumns / kWidth;
    Floats sum[kRows][kVectors];
    for (int32_t r = 0; r < kRows; r++)
        for (int32_t v = 0; v < kVectors; v++) sum[r][v] = load<Floats>(sums + r * kStripColumns + v * kWidth);
    for (int32_t k = 0; k < kDotRows; k++) {
        for (int32_t r = 0; r < kRows; r++) {
            const Floats x = splat(a[k * rows + r]);
            for (int32_t v = 0; v < kVectors; v++)
                sum[r][v] = fused(x, load<Floats>(weights + k * kStripColumns + v * kWidth), sum[r][v]);
        }
    }
    for (int32_t r = 0; r < kRows; r++)
        for (int32_t v = 0; v < kVectors; v++) store(sums + r * kStripColumns + v * kWidth, sum[r][v]);
}

// sums[rows][16] = a * strip; a is a group of rows as prepare_float left it.
static inline void float_tile(const PackedWeight& w, const uint8_t* strip, const float* a, int32_t rows, float* sums) {
    memset(sums, 0, (size_t)(rows * kStripColumns) * sizeof(float));
    for (int32_t c = 0; c < w.chunks; c++, strip += w.chunk_bytes) {
        for (int32_t half = 0; half < w.chunk_rows / kDotRows; half++, a += kDotRows * rows) {
            alignas(64) float weights[kDotRows * kStripColumns];
            decode_half_any(w, strip, half, weights);
            int32_t r = 0;
            for (; r + kFloatRows <= rows; r += kFloatRows)
                add_products<kFloatRows>(a + r, rows, weights, sums + r * kStripColumns);
            for (; r < rows; r++) add_products<1>(a + r, rows, weights, sums + r * kStripColumns);
        }
    }
}

}  // namespace OSL_ISA
}  // namespace osl
