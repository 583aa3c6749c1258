// Packed codes to floats: 32 rows of K of one strip at a time.
#pragma once

#include "kernels/elements.h"
#include "kernels/kernel_set.h"

namespace osl {
namespace OSL_ISA {

// Scales or zero points of one block, kWidth columns from `column`.
static inline Floats block_scales(const PackedWeight& w, const uint8_t* chunk, int32_t block, int32_t column) {
    const int32_t bytes = scale_bytes(w.scheme.scale_type);
    return load_elements((ElementType)w.scheme.scale_type,
                         chunk + w.scales_at + (block * kStripColumns + column) * bytes);
}

// kWidth bytes. GCC 12 takes its own conversion apart byte by byte.
static inline Ints widen_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_maskz_cvtepu8_epi32(0xFFFF, load<__m128i>(from));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
    return __builtin_convertvector(load<Bytes>(from), Ints);
#endif
}

static inline Floats block_zeros(const PackedWeight& w, const uint8_t* chunk, int32_t block, int32_t column) {
    if (!w.scheme.zero_points) return splat((float)(1 << (w.scheme.bits - 1)));
    const bool bytes = w.scheme.bits == 8;
    const uint8_t* from = chunk + w.zeros_at + (bytes ? block : block / 2) * kStripColumns + column;
    Ints zeros = widen_bytes(from);
    if (!bytes) zeros = (zeros >> (block % 2 * 4)) & 15;
    return __builtin_convertvector(zeros, Floats);
}

// Codes of row k (0 to 31) of half `half` of a chunk, kWidth columns from `column`.
template <int32_t kBits>
static inline Ints row_codes(const uint8_t* chunk, int32_t half, int32_t k, int32_t column) {
    const CodePlace place = code_place(kBits, half * kDotRows + k, 0);
    const int32_t in_word = place.byte % 4;  // 4 consecutive k of a column make a word
    const Words words = load<Words>(chunk + place.byte - in_word + column * 4);
    const int32_t mask = kBits == 3 ? 3 : (1 << kBits) - 1;
    Ints codes = (Ints)(words >> (in_word * 8 + place.shift)) & mask;
    if (kBits == 3) {
        const CodePlace high = high_bit_place(half * kDotRows + k, 0);
        const Words plane = load<Words>(chunk + high.byte - high.byte % 4 + column * 4);
        codes |= ((Ints)(plane >> (high.byte % 4 * 8 + high.shift)) & 1) << 2;
    }
    return codes;
}

// (code - zero point) * scale for 32 rows and 16 columns, [32][16].
template <int32_t kBits>
static inline void decode_half(const PackedWeight& w, const uint8_t* chunk, int32_t half, float* to) {
    for (int32_t column = 0; column < kStripColumns; column += kWidth) {
        for (int32_t part = 0; part < 2; part++) {  // blocks of 16 rows have two scales here
            const int32_t in_chunk = (half * kDotRows + part * 16) >> w.block_shift;
            const Floats scale = block_scales(w, chunk, in_chunk, column);
            const Floats zero = block_zeros(w, chunk, in_chunk, column);
            for (int32_t k = part * 16; k < part * 16 + 16; k++) {
                const Floats code = __builtin_convertvector(row_codes<kBits>(chunk, half, k, column), Floats);
                store(to + k * kStripColumns + column, (code - zero) * scale);
            }
        }
    }
}

static inline void decode_half_any(const PackedWeight& w, const uint8_t* chunk, int32_t half, float* to) {
    switch (w.scheme.bits) {
        case 8:
            return decode_half<8>(w, chunk, half, to);
        case 4:
            return decode_half<4>(w, chunk, half, to);
        case 3:
            return decode_half<3>(w, chunk, half, to);
        default:
            return decode_half<2>(w, chunk, half, to);
    }
}

}  // namespace OSL_ISA
}  // namespace osl
