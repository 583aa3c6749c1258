// The int8 mode of a few rows with sparse 4-bit weights: codes go from the bitmap into the product, by VPEXPANDB.
#pragma once

#include "kernels/expand_words.h"

namespace osl {
namespace OSL_ISA {

constexpr int64_t kSparseRows = 4;
constexpr int32_t kSparseFetch = 2048;  // bytes ahead of what is read

// kRows rows of a group by one strip; sums are [kRows][16].
template <int32_t kRows, bool kShortBlocks, bool kZeroPoints>
static void sparse_rows(const SparseWeight& s, const uint8_t* chunk, const Int8Rows& a, float* sums) {
    PackedWeight w = s.packed;  // with the places of a sparse chunk
    w.scales_at = s.scales_at;
    w.zeros_at = s.zeros_at;
    constexpr int32_t kParts = kShortBlocks ? 2 : 1, kWords = kDotRows / kWordRows / kParts;
    __m512 sum[kRows];
    for (int32_t i = 0; i < kRows; i++) sum[i] = _mm512_setzero_ps();
    int64_t k = 0;
    for (int32_t c = 0; c < w.chunks; c++) {
        const uint8_t *low = chunk + s.values_at, *high = low;
        for (int32_t half = 0; half < w.chunk_rows / kDotRows; half++, k += kDotRows) {
#pragma GCC unroll 2
            for (int32_t part = 0; part < kParts; part++) {
                const int32_t block = kShortBlocks ? half * 2 + part : (half * kDotRows) >> w.block_shift;
                const __m512i zeros =
                    kZeroPoints ? _mm512_cvtps_epi32((__m512)block_zeros(w, chunk, block, 0)) : __m512i{};
                const __m512i fill =
                    kZeroPoints ? _mm512_mullo_epi32(zeros, _mm512_set1_epi32(0x01010101)) : _mm512_set1_epi8(8);
                __m512i codes[kWords];
#pragma GCC unroll 8
                for (int32_t j = 0; j < kWords; j++) {
                    const int32_t word = part * kWords + j;
                    const uint64_t present = bitmap_word(chunk, half * 8 + word);
                    if (word < 4) {
                        codes[j] = expand_word<4, false>(present, low, fill);
                        low += values_in(present);
                    } else {
                        codes[j] = expand_word<4, true>(present, high, fill);
                        high += values_in(present);
                    }
                }
                const __m512 scale = (__m512)block_scales(w, chunk, block, 0);
                const int64_t at = (k / kDotRows * kParts + part) * a.rows;
                const int8_t* x = a.codes + k * a.rows + part * 16;
#pragma GCC unroll 4
                for (int32_t i = 0; i < kRows; i++) {
                    const __m512i product =
                        dot<kWords, true, kZeroPoints>(codes, x + i * kDotRows, a.offsets[at + i], zeros);
                    sum[i] = add_scaled(sum[i], product, scale, a.scales[at + i]);
                }
            }
        }
        const uint8_t* next = low > high ? low : high;
        for (; chunk < next; chunk += 64) _mm_prefetch((const char*)chunk + kSparseFetch, _MM_HINT_T0);
        chunk = next;
    }
    for (int32_t i = 0; i < kRows; i++) _mm512_store_ps(sums + i * kStripColumns, sum[i]);
}

// sums[rows][16] of one strip; up to kSparseRows rows.
static inline void sparse_tile(const SparseWeight& s, int64_t strip, const Int8Rows& a, float* sums) {
    using Rows = void (*)(const SparseWeight&, const uint8_t*, const Int8Rows&, float*);
#define OSL_ROWS(rows)                                                       \
    {                                                                        \
        {sparse_rows<rows, false, false>, sparse_rows<rows, false, true>},   \
            {sparse_rows<rows, true, false>, sparse_rows<rows, true, true>}, \
    }
    static constexpr Rows kTiles[kSparseRows][2][2] = {OSL_ROWS(1), OSL_ROWS(2), OSL_ROWS(3), OSL_ROWS(4)};
#undef OSL_ROWS
    const PackedScheme& scheme = s.packed.scheme;
    kTiles[a.rows - 1][scheme.block < kDotRows][scheme.zero_points](s, s.payload + s.strip_at(strip), a, sums);
}

}  // namespace OSL_ISA
}  // namespace osl
