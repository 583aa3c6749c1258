// The int8 mode with NEON: sdot, and smmla for pairs of rows where the compiler may use it. One register holds 4 k of a
// quarter of the 16 columns. Codes stay within int8: those of 8 bits are taken less 128.
#pragma once

#include <arm_neon.h>

#include "kernels/decode.h"

namespace osl {
namespace OSL_ISA {

constexpr int32_t kQuarterStrip = 4;  // columns
constexpr int32_t kFetchAhead = 4 * 576;

// Codes of 32 rows for the 4 columns whose words begin at byte `at` of a 64-byte vector; w[j]: rows 4 j of the half.
static inline void load_codes(int32_t bits, const uint8_t* chunk, int32_t half, int32_t at, int8x16_t w[8]) {
    const auto load = [&](const uint8_t* from) { return vld1q_u8(from + at); };
    if (bits == 4) {
        for (int32_t j = 0; j < 4; j++) {
            const uint8x16_t v = load(chunk + half * 256 + j * 64);
            w[j] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
            w[j + 4] = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
        }
        return;
    }
    if (bits == 8) {
        for (int32_t j = 0; j < 8; j++)
            w[j] = vreinterpretq_s8_u8(veorq_u8(load(chunk + half * 512 + j * 64), vdupq_n_u8(128)));
        return;
    }
    const uint8_t* low = chunk + half / 2 * (bits == 3 ? 384 : 256);
    for (int32_t j = 0; j < 8; j++) {
        const int8x16_t shift = vdupq_n_s8((int8_t)-(half % 2 * 4 + j / 4 * 2));
        uint8x16_t codes = vandq_u8(vshlq_u8(load(low + j % 4 * 64), shift), vdupq_n_u8(3));
        if (bits == 3) {
            const int8x16_t bit = vdupq_n_s8((int8_t)-(half % 2 * 4 + j / 2));
            const uint8x16_t plane = vandq_u8(vshlq_u8(load(low + 256 + j % 2 * 64), bit), vdupq_n_u8(1));
            codes = vorrq_u8(codes, vshlq_n_u8(plane, 2));
        }
        w[j] = vreinterpretq_s8_u8(codes);
    }
}

// Of one block for 4 columns: what turns exact sums into addends.
struct BlockScale {
    float32x4_t scale;
    int32x4_t zeros;  // factor of the row's offset
};

static inline void add_row(const BlockScale& block, int32x4_t product, int32_t offset, float scale, float* sum) {
    product = vmlaq_n_s32(product, block.zeros, offset);
    const float32x4_t addend = vmulq_f32(vcvtq_f32_s32(product), vmulq_n_f32(block.scale, scale));
    vst1q_f32(sum, vaddq_f32(vld1q_f32(sum), addend));
}

template <int32_t kVectors>
static inline int32x4_t dot(const int8x16_t* w, const int8_t* a) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int32_t i = 0; i < kVectors; i += 4) {
        const int8x16_t x = vld1q_s8(a + 4 * i);
        sum = vdotq_laneq_s32(sum, w[i], x, 0);
        sum = vdotq_laneq_s32(sum, w[i + 1], x, 1);
        sum = vdotq_laneq_s32(sum, w[i + 2], x, 2);
        sum = vdotq_laneq_s32(sum, w[i + 3], x, 3);
    }
    return sum;
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
struct RowPair {
    int32x4_t first, second;
};

// Two rows, 32 bytes apart, by 4 columns.
template <int32_t kVectors>
static inline RowPair dot_pair(const int8x16_t* w, const int8_t* a) {
    int32x4_t left = vdupq_n_s32(0), right = left;  // of columns 0, 1 and 2, 3: [first row | second row]
    for (int32_t j = 0; j < kVectors; j += 2) {
        const int32x4_t even = vreinterpretq_s32_s8(w[j]), odd = vreinterpretq_s32_s8(w[j + 1]);
        const int8x16_t x = vcombine_s8(vld1_s8(a + 4 * j), vld1_s8(a + kDotRows + 4 * j));
        left = vmmlaq_s32(left, x, vreinterpretq_s8_s32(vzip1q_s32(even, odd)));
        right = vmmlaq_s32(right, x, vreinterpretq_s8_s32(vzip2q_s32(even, odd)));
    }
    return {vcombine_s32(vget_low_s32(left), vget_low_s32(right)),
            vcombine_s32(vget_high_s32(left), vget_high_s32(right))};
}
#endif

// Rows [k, k + 32) of K, columns [column, column + 4) of the strip, all rows of a. kParts blocks lie in the 32 rows.
template <int32_t kParts>
static inline void add_half(const PackedWeight& w, const uint8_t* chunk, int32_t half, int32_t column,
                            const Int8Rows& a, int64_t k, float* sums) {
    int8x16_t codes[8];
    load_codes(w.scheme.bits, chunk, half, column * 4, codes);
    for (int32_t part = 0; part < kParts; part++) {
        const int32_t in_chunk = kParts == 2 ? half * 2 + part : (half * kDotRows) >> w.block_shift;
        BlockScale block;
        block.scale = (float32x4_t)block_scales(w, chunk, in_chunk, column);
        // The offset is -sum(a), times the zero point if all blocks share it; 8-bit codes lack 128 * sum(a).
        if (w.scheme.zero_points) {
            const int32x4_t zeros = vcvtq_s32_f32((float32x4_t)block_zeros(w, chunk, in_chunk, column));
            block.zeros = w.scheme.bits == 8 ? vsubq_s32(zeros, vdupq_n_s32(128)) : zeros;
        } else {
            block.zeros = vdupq_n_s32(w.scheme.bits == 8 ? 0 : 1);
        }
        const int64_t at = (k / kDotRows * kParts + part) * a.rows;
        const int8_t* x = a.codes + k * a.rows + part * 16;
        const int8x16_t* mine = codes + part * 4;
        float* sum = sums + column;
        int32_t r = 0;
#if defined(__ARM_FEATURE_MATMUL_INT8)
        for (; r + 2 <= a.rows; r += 2, x += 2 * kDotRows) {
            const RowPair pair = dot_pair<8 / kParts>(mine, x);
            add_row(block, pair.first, a.offsets[at + r], a.scales[at + r], sum + r * kStripColumns);
            add_row(block, pair.second, a.offsets[at + r + 1], a.scales[at + r + 1], sum + (r + 1) * kStripColumns);
        }
#endif
        for (; r < a.rows; r++, x += kDotRows)
            add_row(block, dot<8 / kParts>(mine, x), a.offsets[at + r], a.scales[at + r], sum + r * kStripColumns);
    }
}

constexpr int64_t kPairedRows = 0;

static inline void int8_tile(const PackedWeight& w, const uint8_t* strip, const Int8Rows& a, int32_t, float* sums) {
    memset(sums, 0, (size_t)(a.rows * kStripColumns) * sizeof(float));
    int64_t k = 0;
    for (int32_t c = 0; c < w.chunks; c++, strip += w.chunk_bytes) {
        for (int32_t line = 0; line < w.chunk_bytes; line += 64) __builtin_prefetch(strip + kFetchAhead + line);
        for (int32_t half = 0; half < w.chunk_rows / kDotRows; half++, k += kDotRows) {
            for (int32_t column = 0; column < kStripColumns; column += kQuarterStrip) {
                if (w.scheme.block < kDotRows)
                    add_half<2>(w, strip, half, column, a, k, sums);
                else
                    add_half<1>(w, strip, half, column, a, k, sums);
            }
        }
    }
}

}  // namespace OSL_ISA
}  // namespace osl
