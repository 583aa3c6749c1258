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
    for (int32_t column = 0; column < kStripColumns; column++) {
        int32_t zero = 1 << (s.packed.scheme.bits - 1);
        if (s.packed.scheme.zero_points) {
            const uint8_t* zeros = chunk + s.zeros_at + column;
            zero = s.packed.scheme.bits == 8 ? zeros[block * kStripColumns]
                                             : zeros[block / 2 * kStripColumns] >> (block % 2 * 4) & 15;
        }
        memset(fill + column * 4, zero, 4);
    }
}

#if defined(__AVX512VBMI2__)

typedef __m512i Word;

static inline Word load_fill(const uint8_t* fill) { return _mm512_loadu_si512(fill); }
static inline void store_word(uint8_t* to, Word w) { _mm512_storeu_si512(to, w); }

// The codes at `stream` where `present` has bits, `fill` elsewhere; of 4 bits, those in one of the nibbles.
template <int32_t kBits, bool kHigh>
static inline Word expand_word(uint64_t present, const uint8_t* stream, Word fill) {
    Word codes = _mm512_loadu_si512(stream);
    if constexpr (kHigh) codes = _mm512_srli_epi16(codes, 4);
    if constexpr (kBits == 4) codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    return _mm512_mask_expand_epi8(fill, present, codes);
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

// Bytes of `stream`, lowest first, to the bytes whose bit of `present` is set; the other ones of `fill`.
static inline uint64_t expand_octet(uint32_t present, uint64_t stream, uint64_t fill) {
#if defined(__BMI2__)
    const uint64_t bytes = _pdep_u64(present, 0x0101010101010101u) * 0xFF;
    return _pdep_u64(stream, bytes) | (fill & ~bytes);
#else
    uint64_t codes = 0;
    for (int32_t i = 0; i < 8; i++) {
        const bool there = present >> i & 1;
        codes |= (there ? stream & 0xFF : fill >> (8 * i) & 0xFF) << (8 * i);
        stream >>= there ? 8 : 0;
    }
    return codes;
#endif
}

// The codes at `stream` where `present` has bits, `fill` elsewhere; of 4 bits, those in one of the nibbles.
template <int32_t kBits, bool kHigh>
static inline Word expand_word(uint64_t present, const uint8_t* stream, const Word& fill) {
    Word codes;
    for (int32_t i = 0; i < 8; i++) {
        const uint32_t here = present >> (8 * i) & 0xFF;
        uint64_t bytes;
        memcpy(&bytes, stream, sizeof bytes);
        if constexpr (kHigh) bytes >>= 4;
        if constexpr (kBits == 4) bytes &= 0x0F0F0F0F0F0F0F0Fu;
        codes.octets[i] = expand_octet(here, bytes, fill.octets[i]);
        stream += __builtin_popcount(here);
    }
    return codes;
}

#endif

static inline int32_t values_in(uint64_t present) { return __builtin_popcountll(present); }

}  // namespace OSL_ISA
}  // namespace osl
