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

#if defined(__AVX512F__)

constexpr int32_t kFewFloatRows = 4;

// Codes of row k (0 to 15) of a part of a half of a chunk as floats, less 8 where all blocks have that zero point.
template <int32_t kBits>
static inline __m512 codes_as_floats(const uint8_t* strip, int32_t half, int32_t part, int32_t k, __m512 table) {
    if (kBits == 4) {
        const __m512i v = _mm512_loadu_si512(strip + half * 256 + k / 4 * 64);
        return _mm512_permutexvar_ps(_mm512_srli_epi32(v, k % 4 * 8 + part * 4), table);
    }
    const __m512i v = _mm512_loadu_si512(strip + half * 512 + (part * 4 + k / 4) * 64);
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, k % 4 * 8), _mm512_set1_epi32(255)));
}

// Few rows of 4-bit or 8-bit weights: codes become floats by looking them up or by conversion, a block's sum is scaled
// once.
template <int32_t kBits, int32_t kRows, bool kZeroPoints>
static void float_few_rows(const PackedWeight& w, const uint8_t* strip, const float* a, int32_t rows, float* sums) {
    constexpr int32_t kAhead = kBits * 576;
    constexpr bool kSubtract = kZeroPoints || kBits == 8;
    const __m512 table = _mm512_sub_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                       _mm512_set1_ps(kZeroPoints ? 0 : 8));
    __m512 sum[kRows];
    for (int32_t r = 0; r < kRows; r++) sum[r] = _mm512_setzero_ps();
    for (int32_t c = 0; c < w.chunks; c++, strip += w.chunk_bytes) {
        for (int32_t line = 0; line < w.chunk_bytes; line += 64)
            _mm_prefetch((const char*)strip + kAhead + line, _MM_HINT_T0);
        for (int32_t half = 0; half < w.chunk_rows / kDotRows; half++, a += kDotRows * rows) {
#pragma GCC unroll 2
            for (int32_t part = 0; part < 2; part++) {
                const int32_t block = (half * kDotRows + part * 16) >> w.block_shift;
                const __m512 zeros = kSubtract ? (__m512)block_zeros(w, strip, block, 0) : __m512{};
                __m512 blocks[kRows];
                for (int32_t r = 0; r < kRows; r++) blocks[r] = _mm512_setzero_ps();
#pragma GCC unroll 16
                for (int32_t k = 0; k < 16; k++) {
                    __m512 x = codes_as_floats<kBits>(strip, half, part, k, table);
                    if (kSubtract) x = _mm512_sub_ps(x, zeros);
                    for (int32_t r = 0; r < kRows; r++)
                        blocks[r] = _mm512_fmadd_ps(x, _mm512_set1_ps(a[(part * 16 + k) * rows + r]), blocks[r]);
                }
                const __m512 scale = (__m512)block_scales(w, strip, block, 0);
                for (int32_t r = 0; r < kRows; r++) sum[r] = _mm512_fmadd_ps(blocks[r], scale, sum[r]);
            }
        }
    }
    for (int32_t r = 0; r < kRows; r++) _mm512_storeu_ps(sums + r * kStripColumns, sum[r]);
}

template <int32_t kBits>
static inline void float_few_rows_any(const PackedWeight& w, const uint8_t* strip, const float* a, int32_t rows,
                                      float* sums) {
    using Rows = void (*)(const PackedWeight&, const uint8_t*, const float*, int32_t, float*);
    static constexpr Rows kRows[kFewFloatRows][2] = {{float_few_rows<kBits, 1, false>, float_few_rows<kBits, 1, true>},
                                                     {float_few_rows<kBits, 2, false>, float_few_rows<kBits, 2, true>},
                                                     {float_few_rows<kBits, 3, false>, float_few_rows<kBits, 3, true>},
                                                     {float_few_rows<kBits, 4, false>, float_few_rows<kBits, 4, true>}};
    kRows[rows - 1][w.scheme.zero_points](w, strip, a, rows, sums);
}

#endif

// sums[rows][16] = a * strip; a is a group of rows as prepare_float left it.
static inline void float_tile(const PackedWeight& w, const uint8_t* strip, const float* a, int32_t rows, float* sums) {
#if defined(__AVX512F__)
    if (rows <= kFewFloatRows && w.scheme.bits == 4) return float_few_rows_any<4>(w, strip, a, rows, sums);
    if (rows <= kFewFloatRows && w.scheme.bits == 8) return float_few_rows_any<8>(w, strip, a, rows, sums);
#endif
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
