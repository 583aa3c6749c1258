// From sums of up to 16 rows and 16 columns to elements of y: low-rank part, bias, activation, residual, type.
#pragma once

#include "kernels/elements.h"
#include "kernels/kernel_set.h"

namespace osl {
namespace OSL_ISA {

// e^x with a relative error below 2^-22: 2^n * e^r, |r| <= ln(2) / 2, e^r as its Taylor polynomial of degree 7.
static inline Floats exponential(Floats x) {
    x = clamp(x, splat(-87.0f), splat(88.0f));
    const Floats n = round_even(x * 1.44269504f);
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln(2) in two parts
    Floats e = splat(1.0f / 5040.0f);
    e = e * r + 1.0f / 720.0f;
    e = e * r + 1.0f / 120.0f;
    e = e * r + 1.0f / 24.0f;
    e = e * r + 1.0f / 6.0f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return e * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// x * sigmoid(z). Below -87 the product is less than any float that matters, and e^-z would overflow.
static inline Floats times_sigmoid(Floats x, Floats z) {
    return select(z < -87.0f, splat(0.0f), x / (exponential(-z) + 1.0f));
}

static inline Floats silu(Floats x) { return times_sigmoid(x, x); }

// x / 2 * (1 + tanh(z)) = x * sigmoid(2 z) with z = sqrt(2 / pi) * (x + 0.044715 x^3).
static inline Floats gelu_tanh(Floats x) { return times_sigmoid(x, (x + x * x * x * 0.044715f) * 1.5957691216f); }

// x * Phi(x), with erfc by formula 7.1.26 of Abramowitz and Stegun (absolute error 1.5e-7).
static inline Floats gelu_erf(Floats x) {
    const Floats z = absolute(x) * 0.70710678f;
    const Floats t = splat(1.0f) / (z * 0.3275911f + 1.0f);
    Floats series = splat(1.061405429f);
    series = series * t - 1.453152027f;
    series = series * t + 1.421413741f;
    series = series * t - 0.284496736f;
    series = series * t + 0.254829592f;
    const Floats tail = series * t * exponential(-z * z) * 0.5f;  // of the side away from 0
    return x * select(x < 0, tail, 1.0f - tail);
}

static inline Floats activate(Activation activation, Floats x) {
    switch (activation) {
        case kSilu:
        case kSiluGate:
            return silu(x);
        case kGelu:
        case kGeluGate:
            return gelu_erf(x);
        case kGeluTanh:
        case kGeluTanhGate:
            return gelu_tanh(x);
        default:
            return x;
    }
}

// 16 elements of which `count` exist; the others are read as zero and not written.
static inline void load_columns(ElementType type, const void* from, int32_t count, float* to) {
    load_row(type, (const uint8_t*)from, count, kStripColumns, to);
}

static inline void store_columns(ElementType type, const float* from, int32_t count, uint8_t* to) {
    const int32_t bytes = element_bytes(type);
    if (count == kStripColumns) {
        for (int32_t i = 0; i < kStripColumns; i += kWidth)
            store_elements(type, to + i * bytes, load<Floats>(from + i));
        return;
    }
    alignas(64) uint8_t staged[kStripColumns * 4];
    for (int32_t i = 0; i < kStripColumns; i += kWidth)
        store_elements(type, staged + i * bytes, load<Floats>(from + i));
    memcpy(to, staged, (size_t)(count * bytes));
}

// sums + t * v + bias for one row of one strip, in place.
static inline void add_linear_parts(const MatMulProblem& p, const float* t, StripColumns columns, float* sums) {
    alignas(64) float part[kStripColumns];
    for (int64_t i = 0; i < p.rank; i++) {
        load_columns(kFloat32, p.low_rank_v + i * p.b.columns + columns.first, columns.count, part);
        for (int32_t c = 0; c < kStripColumns; c += kWidth)
            store(sums + c, load<Floats>(sums + c) + load<Floats>(part + c) * t[i]);
    }
    if (p.bias == nullptr) return;
    load_columns(p.type, element_at(p.bias, p.type, columns.first), columns.count, part);
    for (int32_t c = 0; c < kStripColumns; c += kWidth)
        store(sums + c, load<Floats>(sums + c) + load<Floats>(part + c));
}

// sums of one strip, rows `row_stride` floats apart, or of a gate strip with those of the strip that it multiplies
// `pair_stride` floats further on; both are overwritten. Row 0 is row `first` of y; low_rank is a * u of all rows.
static inline void finish_rows(const MatMulProblem& p, const float* low_rank, int64_t first, int32_t rows,
                               int64_t strip, float* sums, int64_t row_stride, int64_t stride) {
    const bool gate = p.activation >= kSiluGate;
    const StripColumns columns = columns_of_strip(p.b, strip);
    const bool plain = p.activation == kNoActivation && p.residual == nullptr;
    if (plain && p.rank == 0 && p.bias == nullptr && p.type == kFloat32 && columns.count == kStripColumns) {
        float* y = (float*)p.y + first * p.y_stride + columns.first;
        for (int32_t r = 0; r < rows; r++, y += p.y_stride, sums += row_stride)
            for (int32_t c = 0; c < kStripColumns; c += kWidth) store(y + c, load<Floats>(sums + c));
        return;
    }
    for (int32_t r = 0; r < rows; r++, sums += row_stride) {
        const int64_t row = first + r;
        if (p.rank > 0 || p.bias != nullptr) {
            const float* t = low_rank + row * p.rank;
            add_linear_parts(p, t, columns, sums);
            if (gate) add_linear_parts(p, t, columns_of_strip(p.b, strip + 1), sums + stride);
        }
        if (!plain) {
            alignas(64) float addend[kStripColumns] = {};
            if (p.residual != nullptr)
                load_columns(p.type, element_at(p.residual, p.type, row * p.residual_stride + columns.first),
                             columns.count, addend);
            for (int32_t c = 0; c < kStripColumns; c += kWidth) {
                Floats x = activate(p.activation, load<Floats>(sums + c));
                if (gate) x = x * load<Floats>(sums + stride + c);
                store(sums + c, x + load<Floats>(addend + c));
            }
        }
        store_columns(p.type, sums, columns.count,
                      (uint8_t*)p.y + (row * p.y_stride + columns.first) * element_bytes(p.type));
    }
}

}  // namespace OSL_ISA
}  // namespace osl
