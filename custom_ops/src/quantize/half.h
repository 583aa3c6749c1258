// Rounding to IEEE half precision, ties to even, out-of-range values saturated.
#pragma once

#include "quantize/lanes.h"

namespace osl {
namespace OSL_ISA {

constexpr float kHalfMax = 65504.0f;
constexpr float kHalfMinNormal = 6.103515625e-05f;    // 2^-14
constexpr float kHalfUnit = 5.9604644775390625e-08f;  // 2^-24, the spacing of subnormal halves

// The float nearest to x that a half holds.
inline Floats round_to_half(Floats x) {
    x = clamp(x, splat(-kHalfMax), splat(kHalfMax));
    const Ints bits = (Ints)x;
    const Ints tie = (bits >> 13) & 1;
    const Floats normal = (Floats)((bits + 0xFFF + tie) & ~0x1FFF);
    const Floats subnormal = round_even(x * (1.0f / kHalfUnit)) * kHalfUnit;
    return select(absolute(x) < kHalfMinNormal, subnormal, normal);
}

// The bits of x as a half; x must come from round_to_half.
inline uint16_t half_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const float size = x < 0 ? -x : x;
    if (size < kHalfMinNormal) return (uint16_t)(sign | (uint32_t)(size * (1.0f / kHalfUnit)));
    return (uint16_t)(sign | (((bits & 0x7FFFFFFFu) >> 13) - (112u << 10)));
}

}  // namespace OSL_ISA
}  // namespace osl
