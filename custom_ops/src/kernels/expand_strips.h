// A sparse packed weight back to the packed weight that it was made of: the same bytes.
#pragma once

#include "kernels/expand_words.h"

namespace osl {
namespace OSL_ISA {

constexpr int32_t kGroupWords = 16;  // 64 rows, after which the order of codes in a packed chunk repeats itself

// Codes that share a byte lie 16 rows, that is 4 words, apart. `codes` are kGroupWords * 64 bytes; see code_place().
template <int32_t kShared, int32_t kWidth>
static inline void merge_codes(const uint64_t* codes, uint64_t* to) {
    constexpr int32_t kOctets = 8 * 4;  // of 4 words
    for (int32_t span = 0; span < 4 / kShared; span++, codes += kShared * kOctets, to += kOctets)
        for (int32_t i = 0; i < kOctets; i++) {
            uint64_t merged = 0;
            for (int32_t s = 0; s < kShared; s++) merged |= codes[s * kOctets + i] << (s * kWidth);
            to[i] = merged;
        }
}

// See high_bit_place(): codes whose third bits share a byte lie 8 rows, 2 words, apart.
static inline void merge_high_bits(uint64_t* codes, uint64_t* to) {
    constexpr uint64_t kOnes = 0x0101010101010101u;
    for (int32_t i = 0; i < 16; i++) {
        uint64_t merged = 0;
        for (int32_t s = 0; s < 8; s++) merged |= (codes[s * 16 + i] >> 2 & kOnes) << s;
        to[i] = merged;
    }
    for (int32_t i = 0; i < kGroupWords * 8; i++) codes[i] &= 3 * kOnes;
}

template <int32_t kBits>
static inline const uint8_t* expand_chunk(const SparseWeight& s, const uint8_t* chunk, uint8_t* to) {
    const PackedWeight& w = s.packed;
    const uint8_t* values = chunk + s.values_at;
    alignas(64) uint64_t codes[kGroupWords * 8], merged[kGroupWords * 8];
    alignas(64) uint8_t fill[64];
    int64_t bit = 0;
    for (int32_t first = 0; first < w.chunk_rows / kWordRows; first += kGroupWords) {
        for (int32_t i = 0; i < kGroupWords; i++) {
            const int32_t word = first + i, block = word * kWordRows >> w.block_shift;
            if (i == 0 || (word * kWordRows & (w.scheme.block - 1)) == 0) fill_of(s, chunk, block, fill);
            const uint64_t present = bitmap_word(chunk, word);
            store_word((uint8_t*)(codes + i * 8), expand_word<kBits>(present, values, bit, load_fill(fill)));
            bit += values_in(present) * kBits;
        }
        constexpr int32_t kBytes = kGroupWords * 64 * kBits / 8;
        if constexpr (kBits == 3) merge_high_bits(codes, merged + 32);
        merge_codes<kBits == 8 ? 1 : kBits == 4 ? 2 : 4, kBits == 3 ? 2 : kBits>(codes, merged);
        memcpy(to + first / kGroupWords * kBytes, merged, kBytes);
    }
    memcpy(to + w.scales_at, chunk + s.scales_at, (size_t)(s.values_at - s.scales_at));
    return values + (bit + 7) / 8;
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
    switch (s.packed.scheme.bits) {
        case 8:
            return expand_strips_of<8>(s, first, last, strips);
        case 4:
            return expand_strips_of<4>(s, first, last, strips);
        case 3:
            return expand_strips_of<3>(s, first, last, strips);
        default:
            return expand_strips_of<2>(s, first, last, strips);
    }
}

}  // namespace OSL_ISA
}  // namespace osl
