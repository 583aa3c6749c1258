// The int8 mode with AVX2, and with its VNNI extension where the compiler may use it. One register holds 4 k of half of
// the 16 columns.
#pragma once

#include "kernels/decode.h"

namespace osl {
namespace OSL_ISA {

constexpr int32_t kHalfStrip = 8;  // columns
constexpr int32_t kFetchAhead = 4 * 576;

struct HalfStripCodes {
    __m256i low[8];   // low[j]: rows 4 j of the half; all of the code, or its low nibble where it has 8 bits
    __m256i high[8];  // the high nibble
};

static inline __m256i nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }

// Codes of 32 rows for the 8 columns whose words begin at byte `at` of a 64-byte vector.
static inline __attribute__((always_inline)) void load_codes(int32_t bits, const uint8_t* chunk, int32_t half,
                                                             int32_t at, HalfStripCodes* codes) {
    const auto load = [&](const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)(from + at)); };
    if (bits == 4) {
        for (int32_t j = 0; j < 4; j++) {
            const __m256i v = load(chunk + half * 256 + j * 64);
            codes->low[j] = nibbles(v);
            codes->low[j + 4] = nibbles(_mm256_srli_epi16(v, 4));
        }
        return;
    }
    if (bits == 8) {
        for (int32_t j = 0; j < 8; j++) {
            const __m256i v = load(chunk + half * 512 + j * 64);
            codes->low[j] = nibbles(v);
            codes->high[j] = nibbles(_mm256_srli_epi16(v, 4));
        }
        return;
    }
    const uint8_t* low = chunk + half / 2 * (bits == 3 ? 384 : 256);
    for (int32_t j = 0; j < 8; j++) {
        const __m128i shift = _mm_cvtsi32_si128(half % 2 * 4 + j / 4 * 2);
        codes->low[j] = _mm256_and_si256(_mm256_srl_epi16(load(low + j % 4 * 64), shift), _mm256_set1_epi8(3));
        if (bits == 2) continue;
        const __m128i bit = _mm_cvtsi32_si128(half % 2 * 4 + j / 2);
        const __m256i plane = _mm256_srl_epi16(load(low + 256 + j % 2 * 64), bit);
        codes->low[j] =
            _mm256_or_si256(codes->low[j], _mm256_slli_epi16(_mm256_and_si256(plane, _mm256_set1_epi8(1)), 2));
    }
}

// sum(a * w) of kVectors * 4 rows; w within [0, 15], so that eight pairs of products fit into 16 bits.
template <int32_t kVectors>
static inline __m256i dot(const __m256i* w, const int8_t* a) {
    __m256i sum = _mm256_setzero_si256();
    for (int32_t j = 0; j < kVectors; j++) {
        int32_t four;
        memcpy(&four, a + 4 * j, sizeof four);
#if defined(__AVXVNNI__)
        sum = _mm256_dpbusd_avx_epi32(sum, w[j], _mm256_set1_epi32(four));
#else
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[j], _mm256_set1_epi32(four)));
#endif
    }
#if !defined(__AVXVNNI__)
    sum = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
#endif
    return sum;
}

// Rows [k, k + 32) of K, columns [column, column + 8) of the strip, all rows of a. kParts blocks lie in the 32 rows;
// kBits is 8, 4, or 0 for fewer.
template <int32_t kParts, int32_t kBits, bool kZeroPoints>
static inline __attribute__((always_inline)) void add_half(const PackedWeight& w, const uint8_t* chunk, int32_t half,
                                                           int32_t column, const Int8Rows& a, int64_t k, float* sums) {
    HalfStripCodes codes;
    load_codes(kBits == 0 ? w.scheme.bits : kBits, chunk, half, column * 4, &codes);
    for (int32_t part = 0; part < kParts; part++) {
        const int32_t block = kParts == 2 ? half * 2 + part : (half * kDotRows) >> w.block_shift;
        const __m256 scale = (__m256)block_scales(w, chunk, block, column);
        const __m256i zeros =
            kZeroPoints ? _mm256_cvtps_epi32((__m256)block_zeros(w, chunk, block, column)) : _mm256_setzero_si256();
        const int64_t at = (k / kDotRows * kParts + part) * a.rows;
        const int8_t* x = a.codes + k * a.rows + part * 16;
        const int32_t* offsets = a.offsets + at;
        const float* scales = a.scales + at;
        const int32_t rows = a.rows;
#pragma GCC unroll 2
        for (int32_t r = 0; r < rows; r++, x += kDotRows) {
            __m256i product = dot<8 / kParts>(codes.low + part * 4, x);
            if (kBits == 8)
                product = _mm256_add_epi32(product, _mm256_slli_epi32(dot<8 / kParts>(codes.high + part * 4, x), 4));
            __m256i offset = _mm256_set1_epi32(offsets[r]);
            if (kZeroPoints) offset = _mm256_mullo_epi32(offset, zeros);
            const __m256 x_scale = _mm256_mul_ps(scale, _mm256_set1_ps(scales[r]));
            float* sum = sums + r * kStripColumns + column;
            const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(product, offset)), x_scale);
            _mm256_store_ps(sum, _mm256_add_ps(_mm256_load_ps(sum), scaled));
        }
    }
}

template <int32_t kParts, int32_t kBits, bool kZeroPoints>
static void int8_tile_of(const PackedWeight& w, const uint8_t* strip, const Int8Rows& a, float* sums) {
    int64_t k = 0;
    for (int32_t c = 0; c < w.chunks; c++, strip += w.chunk_bytes) {
        for (int32_t line = 0; line < w.chunk_bytes; line += 64)
            _mm_prefetch((const char*)strip + kFetchAhead + line, _MM_HINT_T0);
        for (int32_t half = 0; half < w.chunk_rows / kDotRows; half++, k += kDotRows)
            for (int32_t column = 0; column < kStripColumns; column += kHalfStrip)
                add_half<kParts, kBits, kZeroPoints>(w, strip, half, column, a, k, sums);
    }
}

constexpr int64_t kPairedRows = 0;

static inline void int8_tile(const PackedWeight& w, const uint8_t* strip, const Int8Rows& a, int32_t, float* sums) {
    using Tile = void (*)(const PackedWeight&, const uint8_t*, const Int8Rows&, float*);
    static constexpr Tile kTiles[2][3][2] = {{{int8_tile_of<1, 0, false>, int8_tile_of<1, 0, true>},
                                              {int8_tile_of<1, 4, false>, int8_tile_of<1, 4, true>},
                                              {int8_tile_of<1, 8, false>, int8_tile_of<1, 8, true>}},
                                             {{int8_tile_of<2, 0, false>, int8_tile_of<2, 0, true>},
                                              {int8_tile_of<2, 4, false>, int8_tile_of<2, 4, true>},
                                              {int8_tile_of<2, 8, false>, int8_tile_of<2, 8, true>}}};
    memset(sums, 0, (size_t)(a.rows * kStripColumns) * sizeof(float));
    kTiles[w.scheme.block < kDotRows][w.scheme.bits / 4][w.scheme.zero_points](w, strip, a, sums);
}

}  // namespace OSL_ISA
}  // namespace osl
