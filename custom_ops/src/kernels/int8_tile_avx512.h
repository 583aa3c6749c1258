// The int8 mode with AVX-512 VNNI: one register holds 4 k of all 16 columns.
#pragma once

#include "kernels/decode.h"

namespace osl {
namespace OSL_ISA {

// How far ahead of the reads a strip is fetched, into the second-level and the first-level cache. Hardware prefetching
// alone stops at every page (measured on Sapphire Rapids: one and five chunks of block 32).
constexpr int32_t kFetchNear = 1 * 576;
constexpr int32_t kFetchFar = 5 * 576;

// Codes of 32 rows, 4 rows in each vector: w[j] holds rows 4 j.
template <bool kFourBits>
static inline void load_codes(const PackedWeight& weight, const uint8_t* chunk, int32_t half, __m512i w[8]) {
    if (kFourBits) {
        const __m512i nibble = _mm512_set1_epi8(15);
        for (int32_t j = 0; j < 4; j++) {
            const __m512i v = _mm512_loadu_si512(chunk + half * 256 + j * 64);
            w[j] = _mm512_and_si512(v, nibble);
            w[j + 4] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
        }
        return;
    }
    if (weight.scheme.bits == 8) {
        for (int32_t j = 0; j < 8; j++) w[j] = _mm512_loadu_si512(chunk + half * 512 + j * 64);
        return;
    }
    const bool three = weight.scheme.bits == 3;
    const uint8_t* low = chunk + half / 2 * (three ? 384 : 256);
    for (int32_t j = 0; j < 8; j++) {
        const __m512i v = _mm512_loadu_si512(low + j % 4 * 64);
        const __m128i shift = _mm_cvtsi32_si128(half % 2 * 4 + j / 4 * 2);
        w[j] = _mm512_and_si512(_mm512_srl_epi16(v, shift), _mm512_set1_epi8(3));
        if (!three) continue;
        const __m512i plane = _mm512_loadu_si512(low + 256 + j % 2 * 64);
        const __m128i bit = _mm_cvtsi32_si128(half % 2 * 4 + j / 2);
        const __m512i high = _mm512_and_si512(_mm512_srl_epi16(plane, bit), _mm512_set1_epi8(1));
        w[j] = _mm512_or_si512(w[j], _mm512_slli_epi16(high, 2));
    }
}

// sum(a * code) - zero point * sum(a) over kVectors * 4 rows; `offset` is -sum(a), times the zero point if all share
// it. A second chain of sums hides latency where too few rows of a are in flight to do that.
template <int32_t kVectors, bool kTwoChains, bool kZeroPoints>
static inline __m512i dot(const __m512i* w, const int8_t* a, int32_t offset, __m512i zeros) {
    __m512i sum[2] = {_mm512_set1_epi32(offset), _mm512_setzero_si512()};
    if (kZeroPoints) sum[0] = _mm512_mullo_epi32(sum[0], zeros);
    for (int32_t j = 0; j < kVectors; j++) {
        int32_t four;
        memcpy(&four, a + 4 * j, sizeof four);
        __m512i& chain = sum[kTwoChains ? j % 2 : 0];
        chain = _mm512_dpbusd_epi32(chain, w[j], _mm512_set1_epi32(four));
    }
    return kTwoChains ? _mm512_add_epi32(sum[0], sum[1]) : sum[0];
}

static inline __m512 add_scaled(__m512 sum, __m512i dot, __m512 weight_scale, float scale) {
    const __m512 both = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scale));
    return _mm512_add_ps(sum, _mm512_mul_ps(_mm512_cvtepi32_ps(dot), both));
}

// One half of a chunk: rows [k, k + 32) of K for kRows rows of a, from row r of the group.
template <int32_t kRows, bool kFourBits, bool kShortBlocks, bool kZeroPoints>
static inline void add_half(const PackedWeight& w, const uint8_t* chunk, int32_t half, const Int8Rows& a, int64_t k,
                            int32_t r, __m512* sums) {
    __m512i codes[8];
    load_codes<kFourBits>(w, chunk, half, codes);
    constexpr int32_t kParts = kShortBlocks ? 2 : 1;
    const int8_t* x = a.codes + (k * a.rows + r * kDotRows);
    for (int32_t part = 0; part < kParts; part++) {
        const int32_t block = kShortBlocks ? half * 2 + part : (half * kDotRows) >> w.block_shift;
        const __m512 scale = (__m512)block_scales(w, chunk, block, 0);
        const __m512i zeros = kZeroPoints ? _mm512_cvtps_epi32((__m512)block_zeros(w, chunk, block, 0)) : __m512i{};
        const int64_t at = (k / kDotRows * kParts + part) * a.rows + r;
#pragma GCC unroll 16
        for (int32_t i = 0; i < kRows; i++) {
            const __m512i product = dot<8 / kParts, (kRows < 4), kZeroPoints>(
                codes + part * 4, x + i * kDotRows + part * 16, a.offsets[at + i], zeros);
            sums[i] = add_scaled(sums[i], product, scale, a.scales[at + i]);
        }
    }
}

// kRows rows of a group by kStrips neighbouring strips; sums are [kStrips][kGroupRows][16]. Two strips at once are two
// streams of memory, which one core needs to use all of its bandwidth.
template <int32_t kRows, int32_t kStrips, bool kFourBits, bool kShortBlocks, bool kZeroPoints>
static void int8_rows(const PackedWeight& w, const uint8_t* strip, const Int8Rows& a, int32_t r, float* sums) {
    __m512 sum[kStrips][kRows];
    for (int32_t s = 0; s < kStrips; s++)
        for (int32_t i = 0; i < kRows; i++) sum[s][i] = _mm512_setzero_ps();
    const int32_t halves = w.chunk_rows / kDotRows;
    int64_t k = 0;
    for (int32_t c = 0; c < w.chunks; c++, strip += w.chunk_bytes) {
        for (int32_t s = 0; s < kStrips; s++) {
            const char* ahead = (const char*)strip + s * w.strip_bytes;
            for (int32_t line = 0; line < w.chunk_bytes; line += 64) {
                _mm_prefetch(ahead + kFetchNear + line, _MM_HINT_T0);
                _mm_prefetch(ahead + kFetchFar + line, _MM_HINT_T1);
            }
        }
        for (int32_t half = 0; half < halves; half++, k += kDotRows)
#pragma GCC unroll 2
            for (int32_t s = 0; s < kStrips; s++)
                add_half<kRows, kFourBits, kShortBlocks, kZeroPoints>(w, strip + s * w.strip_bytes, half, a, k, r,
                                                                      sum[s]);
    }
    for (int32_t s = 0; s < kStrips; s++)
        for (int32_t i = 0; i < kRows; i++) _mm512_store_ps(sums + (s * kGroupRows + r + i) * kStripColumns, sum[s][i]);
}

template <bool kFourBits, bool kShortBlocks, bool kZeroPoints>
static void int8_group_of(const PackedWeight& w, const uint8_t* strip, const Int8Rows& a, int32_t strips, float* sums) {
    int32_t r = 0;
    if (strips == 2) {
        for (; a.rows - r >= 4; r += 4) int8_rows<4, 2, kFourBits, kShortBlocks, kZeroPoints>(w, strip, a, r, sums);
        for (; a.rows - r >= 2; r += 2) int8_rows<2, 2, kFourBits, kShortBlocks, kZeroPoints>(w, strip, a, r, sums);
        for (; a.rows - r >= 1; r += 1) int8_rows<1, 2, kFourBits, kShortBlocks, kZeroPoints>(w, strip, a, r, sums);
        return;
    }
    for (; a.rows - r >= 16; r += 16) int8_rows<16, 1, kFourBits, kShortBlocks, kZeroPoints>(w, strip, a, r, sums);
    for (; a.rows - r >= 8; r += 8) int8_rows<8, 1, kFourBits, kShortBlocks, kZeroPoints>(w, strip, a, r, sums);
    for (; a.rows - r >= 4; r += 4) int8_rows<4, 1, kFourBits, kShortBlocks, kZeroPoints>(w, strip, a, r, sums);
    for (; a.rows - r >= 2; r += 2) int8_rows<2, 1, kFourBits, kShortBlocks, kZeroPoints>(w, strip, a, r, sums);
    for (; a.rows - r >= 1; r += 1) int8_rows<1, 1, kFourBits, kShortBlocks, kZeroPoints>(w, strip, a, r, sums);
}

// Up to this many rows two strips are done at once.
constexpr int64_t kPairedRows = 4;

static inline void int8_tile(const PackedWeight& w, const uint8_t* strip, const Int8Rows& a, int32_t strips,
                             float* sums) {
    using Tile = void (*)(const PackedWeight&, const uint8_t*, const Int8Rows&, int32_t, float*);
    static constexpr Tile kTiles[2][2][2] = {{{int8_group_of<false, false, false>, int8_group_of<false, false, true>},
                                              {int8_group_of<false, true, false>, int8_group_of<false, true, true>}},
                                             {{int8_group_of<true, false, false>, int8_group_of<true, false, true>},
                                              {int8_group_of<true, true, false>, int8_group_of<true, true, true>}}};
    kTiles[w.scheme.bits == 4][w.scheme.block < kDotRows][w.scheme.zero_points](w, strip, a, strips, sums);
}

}  // namespace OSL_ISA
}  // namespace osl
