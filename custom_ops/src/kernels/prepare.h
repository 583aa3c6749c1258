// Activations to the form that a method reads: padded floats, or int8 codes with scales.
#pragma once

#include "kernels/elements.h"
#include "kernels/kernel_set.h"

namespace osl {
namespace OSL_ISA {

// Blocks whose largest magnitude is below 2^-120 count as zero: 127 / magnitude must stay finite.
constexpr int32_t kNegligibleBits = 0x03800000;
constexpr int32_t kInfinityBits = 0x7F800000;

static inline int32_t largest(Ints v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t lanes[kWidth], most = 0;
    store(lanes, v);
    for (int i = 0; i < kWidth; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
#endif
}

static inline int32_t sum_of(Ints v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t lanes[kWidth], sum = 0;
    store(lanes, v);
    for (int i = 0; i < kWidth; i++) sum += lanes[i];
    return sum;
#endif
}

struct BlockCodes {
    float scale;
    int32_t sum;
};

// Codes of `count` floats (16 or 32): the largest magnitude becomes 127. Not finite: codes 0, scale NaN, so that every
// product with the block is NaN.
static inline BlockCodes quantize_block(const float* x, int32_t count, int8_t* codes) {
    Ints size = {};
    for (int32_t i = 0; i < count; i += kWidth) {
        const Ints bits = load<Ints>(x + i) & 0x7FFFFFFF;
        size = bits > size ? bits : size;
    }
    const int32_t most_bits = largest(size);
    if (most_bits >= kInfinityBits || most_bits < kNegligibleBits) {
        memset(codes, 0, (size_t)count);
        return {most_bits >= kInfinityBits ? __builtin_nanf("") : 0.0f, 0};
    }
    float most;
    memcpy(&most, &most_bits, sizeof most);
    const float inverse = 127.0f / most;
    typedef int8_t Bytes __attribute__((vector_size(kWidth)));
    Ints sum = {};
    for (int32_t i = 0; i < count; i += kWidth) {
        const Ints code = __builtin_convertvector(round_even(load<Floats>(x + i) * inverse), Ints);
        sum += code;
        store(codes + i, __builtin_convertvector(code, Bytes));
    }
    return {most / 127.0f, sum_of(sum)};
}

static inline void prepare_int8(const MatMulProblem& p, uint8_t* scratch, int64_t first, int64_t last) {
    const PackedWeight& w = p.b;
    const int32_t block = activation_block(w);
    const Int8Scratch all = int8_scratch(w, p.m, scratch);
    const int32_t zero = w.scheme.zero_points ? 1 : 1 << (w.scheme.bits - 1);
    for (int64_t row = first; row < last; row++) {
        const int64_t group = row / kGroupRows * kGroupRows, blocks = w.padded_rows / block;
        const int32_t rows = group_rows(p.m, group), r = (int32_t)(row - group);
        int8_t* codes = all.codes + group * w.padded_rows;
        float* scales = all.scales + group * blocks;
        int32_t* offsets = all.offsets + group * blocks;
        const uint8_t* from = element_at(p.a, p.type, row * p.a_stride);
        for (int64_t k = 0; k < w.padded_rows; k += kDotRows) {
            alignas(64) float x[kDotRows];
            const int64_t left = p.b.rows - k;
            const int64_t count = left < 0 ? 0 : left < kDotRows ? left : kDotRows;
            load_row(p.type, from + k * element_bytes(p.type), count, kDotRows, x);
            int8_t* to = codes + (k / kDotRows * rows + r) * kDotRows;
            for (int32_t i = 0; i < kDotRows; i += block) {
                const BlockCodes done = quantize_block(x + i, block, to + i);
                const int64_t at = (k + i) / block * rows + r;
                scales[at] = done.scale;
                offsets[at] = -zero * done.sum;
            }
        }
    }
}

// [groups][K][rows] floats.
static inline void prepare_float(const MatMulProblem& p, uint8_t* scratch, int64_t first, int64_t last) {
    const PackedWeight& w = p.b;
    for (int64_t row = first; row < last; row++) {
        const int64_t group = row / kGroupRows * kGroupRows;
        const int32_t rows = group_rows(p.m, group), r = (int32_t)(row - group);
        float* to = (float*)scratch + group * w.padded_rows + r;
        const uint8_t* from = element_at(p.a, p.type, row * p.a_stride);
        if (rows == 1) {
            load_row(p.type, from, w.rows, w.padded_rows, to);
            continue;
        }
        for (int64_t k = 0; k < w.padded_rows; k += kDotRows) {
            alignas(64) float x[kDotRows];
            const int64_t left = w.rows - k;
            const int64_t count = left < 0 ? 0 : left < kDotRows ? left : kDotRows;
            load_row(p.type, from + k * element_bytes(p.type), count, kDotRows, x);
            for (int32_t i = 0; i < kDotRows; i++) to[(k + i) * rows] = x[i];
        }
    }
}

// t = a * u for the rows, [m][rank].
static inline void prepare_low_rank(const MatMulProblem& p, float* t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        float* to = t + row * p.rank;
        memset(to, 0, (size_t)p.rank * sizeof(float));
        const uint8_t* from = element_at(p.a, p.type, row * p.a_stride);
        for (int64_t k = 0; k < p.b.rows; k++) {
            alignas(64) float x[kWidth];
            load_row(p.type, from + k * element_bytes(p.type), 1, kWidth, x);
            const float* u = p.low_rank_u + k * p.rank;
            for (int64_t i = 0; i < p.rank; i++) to[i] += x[0] * u[i];
        }
    }
}

}  // namespace OSL_ISA
}  // namespace osl
