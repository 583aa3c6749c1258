// Codes to AMX tiles of bfloat16, in pieces small enough to be spread between tile products.
//
// A B tile has 32 rows of K by 16 columns: its row p holds the rows 2 p and 2 p + 1 of K for each column.
#pragma once

#include "kernels/decode.h"

namespace osl {
namespace OSL_ISA {

constexpr int32_t kTileBytes = 1024;  // 16 rows of 64 bytes
constexpr int32_t kTileK = 32;        // bfloat16 elements of a tile's row

// Taking the high half of a float instead of rounding it loses half a unit on average; scales are so much larger that
// the middle of the mantissas is met (2^-8.5). The error of a weight is that of rounding then, at two steps less.
constexpr float kHalfUnit = 1.00276214f;

// What makes weights of codes. A code becomes a float without conversion: its bits, where they stand in the word, under
// an exponent that makes them units. With the code in bits 8 to 11 that is 2^15 + code, and so on.
struct Affine {
    __m512 scale;
    __m512 at8, at12, at16;  // weight = float * scale + this
};

static inline Affine affine_from(__m512 scale, __m512 zero) {
    const __m512 minus = _mm512_mul_ps(scale, _mm512_set1_ps(-kHalfUnit));
    return {_mm512_mul_ps(scale, _mm512_set1_ps(kHalfUnit)),
            _mm512_mul_ps(minus, _mm512_add_ps(zero, _mm512_set1_ps(32768.0f))),
            _mm512_mul_ps(minus, _mm512_add_ps(zero, _mm512_set1_ps(2048.0f))),
            _mm512_mul_ps(minus, _mm512_add_ps(zero, _mm512_set1_ps(128.0f)))};
}

// The same with zero point 8.
static inline Affine affine_from(__m512 scale) {
    return {_mm512_mul_ps(scale, _mm512_set1_ps(kHalfUnit)),
            _mm512_mul_ps(scale, _mm512_set1_ps(-kHalfUnit * 32776.0f)),
            _mm512_mul_ps(scale, _mm512_set1_ps(-kHalfUnit * 2056.0f)),
            _mm512_mul_ps(scale, _mm512_set1_ps(-kHalfUnit * 136.0f))};
}

// How the codes of a weight are brought to bfloat16: the common format without a call, which would cost registers.
enum CodeFormat {
    kPlain4Bit,  // scales float16, symmetric, a scale for 32 rows or more
    kOther4Bit,
    kOtherBits,
};

static inline CodeFormat code_format(const PackedScheme& s) {
    if (s.bits != 4) return kOtherBits;
    const bool plain = s.scale_type == kScaleFloat16 && !s.zero_points && s.block >= kDotRows;
    return plain ? kPlain4Bit : kOther4Bit;
}

// Of the rows 0-15 and 16-31 of a half chunk.
__attribute__((noinline)) static void affines_of(const PackedWeight& w, const uint8_t* chunk, int32_t half,
                                                 Affine to[2]) {
    for (int32_t part = 0; part < 2; part++) {
        const int32_t block = (half * kDotRows + part * 16) >> w.block_shift;
        to[part] = affine_from((__m512)block_scales(w, chunk, block, 0), (__m512)block_zeros(w, chunk, block, 0));
    }
}

// The weights whose codes stand from bit kAt on: (bits & mask | exponent) * scale + offset.
template <int32_t kAt>
static inline __m512 weights_at(__m512i bits, const Affine& affine) {
    constexpr int32_t kMask = 15 << kAt, kExponentBits = (127 + 23 - kAt) << 23;
    const __m512i units =
        _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(kMask), _mm512_set1_epi32(kExponentBits), 0xEA);
    return _mm512_fmadd_ps((__m512)units, affine.scale, kAt == 8 ? affine.at8 : kAt == 12 ? affine.at12 : affine.at16);
}

// High halves of floats, in pairs.
static inline __m512i bf16_pairs(__m512 even, __m512 odd) {
    const __m512i bytes = _mm512_set4_epi32(0x0F0E0F0E, 0x0B0A0B0A, 0x07060706, 0x03020302);
    return _mm512_mask_shuffle_epi8((__m512i)odd, 0x3333333333333333, (__m512i)even, bytes);
}

// A quarter of a tile: 64 bytes of 4-bit codes, which lie as rows 4 j and 16 + 4 j of K.
static inline void decode_quarter(const uint8_t* codes, int32_t j, const Affine& first, const Affine& second,
                                  uint8_t* tile) {
    const __m512i v = _mm512_loadu_si512(codes + j * 64);
    const __m512i up = _mm512_slli_epi32(v, 8), down = _mm512_srli_epi32(v, 12);
    uint8_t *low = tile + 2 * j * 64, *high = low + 8 * 64;
    _mm512_store_si512(low, bf16_pairs(weights_at<8>(up, first), weights_at<16>(up, first)));
    _mm512_store_si512(low + 64, bf16_pairs(weights_at<16>(v, first), weights_at<12>(down, first)));
    _mm512_store_si512(high, bf16_pairs(weights_at<12>(up, second), weights_at<12>(v, second)));
    _mm512_store_si512(high + 64, bf16_pairs(weights_at<8>(down, second), weights_at<16>(down, second)));
}

// A tile of other than 4-bit codes.
__attribute__((noinline)) static void decode_tile_any(const PackedWeight& w, const uint8_t* chunk, int32_t half,
                                                      uint8_t* tile) {
    alignas(64) float weights[kDotRows * kStripColumns];
    decode_half_any(w, chunk, half, weights);
    const __m512 larger = _mm512_set1_ps(kHalfUnit);
    for (int32_t k = 0; k < kDotRows; k += 2) {
        const float* row = weights + k * kStripColumns;
        _mm512_store_si512(tile + k / 2 * 64, bf16_pairs(_mm512_mul_ps(_mm512_load_ps(row), larger),
                                                         _mm512_mul_ps(_mm512_load_ps(row + kStripColumns), larger)));
    }
}

}  // namespace OSL_ISA
}  // namespace osl
