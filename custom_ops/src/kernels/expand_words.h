// The codes of a sparse chunk one to a byte, in the order of the products' vectors: 64 bytes for a word of its bitmap,
// 4 rows of all 16 columns. What the bitmap leaves out is the zero point.
#pragma once

#include "kernels/kernel_set.h"
#include "packing/sparse_weight.h"
#include "quantize/lanes.h"

namespace osl {
namespace OSL_ISA {

// Zero points of a block, 4 times each: what a word's bytes are where nothing is stored.
static inline void fill_of(const SparseWeight& s, const uint8_t* chunk, int32_t block, uint8_t* fill) {
    const int32_t mask = (1 << s.packed.scheme.bits) - 1;
    for (int32_t column = 0; column < kStripColumns; column++) {
        int32_t zero = 1 << (s.packed.scheme.bits - 1);
        if (s.packed.scheme.zero_points) {
            const uint8_t* zeros = chunk + s.zeros_at + column;
            zero = s.packed.scheme.bits == 8 ? zeros[block * kStripColumns]
                                             : zeros[block / 2 * kStripColumns] >> (block % 2 * 4) & 15 & mask;
        }
        memset(fill + column * 4, zero, 4);
    }
}

#if defined(__AVX512VBMI2__)

typedef __m512i Word;

static inline Word load_fill(const uint8_t* fill) { return _mm512_loadu_si512(fill); }
static inline void store_word(uint8_t* to, Word w) { _mm512_storeu_si512(to, w); }

// The 64 codes from bit `bit` of a stream on, one to a byte: bytes 8 i to 8 i + 7 need kBits bytes of it, and a shift.
template <int32_t kBits>
static inline Word stream_codes(const uint8_t* stream, int64_t bit) {
    const __m512i bytes = _mm512_loadu_si512(stream + (bit >> 3));
    if constexpr (kBits == 8) return bytes;
    constexpr uint64_t kOnes = 0x0101010101010101u, kSteps = 0x0706050403020100u;
    const __m512i lanes = _mm512_set_epi64(
        7 * kBits * kOnes + kSteps, 6 * kBits * kOnes + kSteps, 5 * kBits * kOnes + kSteps, 4 * kBits * kOnes + kSteps,
        3 * kBits * kOnes + kSteps, 2 * kBits * kOnes + kSteps, 1 * kBits * kOnes + kSteps, kSteps);
    const __m512i shifts =
        _mm512_add_epi64(_mm512_set1_epi64(kSteps * kBits), _mm512_set1_epi64((int64_t)((bit & 7) * kOnes)));
    const __m512i apart = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(lanes, bytes));
    return _mm512_and_si512(apart, _mm512_set1_epi8((1 << kBits) - 1));
}

template <int32_t kBits>
static inline Word expand_word(uint64_t present, const uint8_t* stream, int64_t bit, Word fill) {
    return _mm512_mask_expand_epi8(fill, present, stream_codes<kBits>(stream, bit));
}

#else

struct Word {
    uint64_t octets[8];
};

static inline Word load_fill(const uint8_t* fill) {
    Word w;
    memcpy(&w, fill, sizeof w);
    return w;
}
static inline void store_word(uint8_t* to, const Word& w) { memcpy(to, &w, sizeof w); }

// Codes of `stream`, lowest bits first, to the bytes whose bit of `present` is set; the other bytes of `fill`.
template <int32_t kBits>
static inline uint64_t expand_octet(uint32_t present, uint64_t stream, uint64_t fill) {
#if defined(__BMI2__)
    const uint64_t ones = _pdep_u64(present, 0x0101010101010101u), bytes = ones * 0xFF;
    return _pdep_u64(stream, ones * ((1 << kBits) - 1)) | (fill & ~bytes);
#else
    uint64_t codes = 0;
    for (int32_t i = 0; i < 8; i++) {
        const bool there = present >> i & 1;
        const uint64_t code = there ? stream & ((1 << kBits) - 1) : fill >> (8 * i) & 0xFF;
        codes |= code << (8 * i);
        stream >>= there ? kBits : 0;
    }
    return codes;
#endif
}

template <int32_t kBits>
static inline Word expand_word(uint64_t present, const uint8_t* stream, int64_t bit, const Word& fill) {
    Word codes;
    for (int32_t i = 0; i < 8; i++) {
        const uint32_t here = present >> (8 * i) & 0xFF;
        uint64_t window;
        memcpy(&window, stream + (bit >> 3), sizeof window);
        codes.octets[i] = expand_octet<kBits>(here, window >> (bit & 7), fill.octets[i]);
        bit += __builtin_popcount(here) * kBits;
    }
    return codes;
}

#endif

static inline int32_t values_in(uint64_t present) { return __builtin_popcountll(present); }

}  // namespace OSL_ISA
}  // namespace osl
