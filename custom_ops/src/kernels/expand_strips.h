// A sparse packed weight back to the packed weight that it was made of: the same bytes.
#pragma once

#include "kernels/expand_words.h"

namespace osl {
namespace OSL_ISA {

constexpr int32_t kHalfWords = kDotRows / kWordRows;  // of 32 rows, after which the order of codes repeats itself

#if defined(__AVX512VBMI2__)

static inline __m512i block_fill(const SparseWeight& s, const uint8_t* chunk, int32_t block) {
    alignas(64) uint8_t fill[64];
    if (!s.packed.scheme.zero_points) return _mm512_set1_epi8(8);
    fill_of(s, chunk, block, fill);
    return load_fill(fill);
}

// Codes of 4 bits without a stop in memory.
static inline const uint8_t* expand_chunk_4bit(const SparseWeight& s, const uint8_t* chunk, uint8_t* to) {
    const PackedWeight& w = s.packed;
    const uint8_t *low = chunk + s.values_at, *high = low;
    for (int32_t half = 0; half < w.chunk_rows / kDotRows; half++) {
        const int32_t row = half * kDotRows;
        const __m512i fill = block_fill(s, chunk, row >> w.block_shift);
        const __m512i fill_high = block_fill(s, chunk, (row + 16) >> w.block_shift);
#pragma GCC unroll 4
        for (int32_t j = 0; j < 4; j++, to += 64) {
            const uint64_t there = bitmap_word(chunk, half * 8 + j), there_high = bitmap_word(chunk, half * 8 + j + 4);
            const __m512i codes = expand_word<4, false>(there, low, fill);
            const __m512i codes_high = expand_word<4, true>(there_high, high, fill_high);
            _mm512_storeu_si512(to, _mm512_or_si512(codes, _mm512_slli_epi16(codes_high, 4)));
            low += values_in(there);
            high += values_in(there_high);
        }
    }
    memcpy(to, chunk + s.scales_at, (size_t)(s.values_at - s.scales_at));
    return low > high ? low : high;
}

#endif

template <int32_t kBits>
static inline const uint8_t* expand_chunk(const SparseWeight& s, const uint8_t* chunk, uint8_t* to) {
#if defined(__AVX512VBMI2__)
    if constexpr (kBits == 4) return expand_chunk_4bit(s, chunk, to);
#endif
    const PackedWeight& w = s.packed;
    const uint8_t *low = chunk + s.values_at, *high = low;
    alignas(64) uint64_t codes[kHalfWords * 8];
    alignas(64) uint8_t fill[64];
    for (int32_t word = 0; word < w.chunk_rows / kWordRows; word += kHalfWords) {
        for (int32_t i = 0; i < kHalfWords; i++) {
            const int32_t row = (word + i) * kWordRows;
            if (i == 0 || (row & (w.scheme.block - 1)) == 0) fill_of(s, chunk, row >> w.block_shift, fill);
            const uint64_t present = bitmap_word(chunk, word + i);
            if (kBits == 4 && i >= kHalfWords / 2) {
                store_word((uint8_t*)(codes + i * 8), expand_word<kBits, true>(present, high, load_fill(fill)));
                high += values_in(present);
            } else {
                store_word((uint8_t*)(codes + i * 8), expand_word<kBits, false>(present, low, load_fill(fill)));
                low += values_in(present);
            }
        }
        if constexpr (kBits == 4)  // codes that share a byte are 16 rows apart
            for (int32_t i = 0; i < kHalfWords * 4; i++) codes[i] |= codes[kHalfWords * 4 + i] << 4;
        constexpr int32_t kBytes = kHalfWords * 64 * kBits / 8;
        memcpy(to, codes, kBytes);
        to += kBytes;
    }
    memcpy(to, chunk + s.scales_at, (size_t)(s.values_at - s.scales_at));
    return low > high ? low : high;
}

template <int32_t kBits>
static void expand_strips_of(const SparseWeight& s, int64_t first, int64_t last, uint8_t* strips) {
    for (int64_t strip = first; strip < last; strip++) {
        const uint8_t* chunk = s.payload + s.strip_at(strip);
        for (int32_t c = 0; c < s.packed.chunks; c++, strips += s.packed.chunk_bytes)
            chunk = expand_chunk<kBits>(s, chunk, strips);
    }
}

// Strips [first, last), one after the other.
static inline void expand_strips_any(const SparseWeight& s, int64_t first, int64_t last, uint8_t* strips) {
    if (s.packed.scheme.bits == 4) return expand_strips_of<4>(s, first, last, strips);
    return expand_strips_of<8>(s, first, last, strips);
}

}  // namespace OSL_ISA
}  // namespace osl
