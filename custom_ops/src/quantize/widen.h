// The three element types as float vectors.
#pragma once

#include "quantize/lanes.h"

namespace osl {
namespace OSL_ISA {

constexpr int32_t kExponent = 0x7F800000;

inline Floats widen_float32(const void* from) { return load<Floats>(from); }

inline Floats widen_bfloat16(const void* from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

inline Floats widen_float16(const void* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, load<__m256i>(from));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#else
    // Move the exponent and fraction into place and correct the exponent's bias by a multiplication, which also
    // normalizes subnormal halves.
    const Words bits = __builtin_convertvector(load<Halves>(from), Words);
    const Floats size = (Floats)((bits & 0x7FFF) << 13) * 5.192296858534828e+33f;  // 2^112
    const Ints special = (Ints)((bits & 0x7C00) == 0x7C00) & kExponent;
    return (Floats)((Ints)size | special | (Ints)((bits & 0x8000) << 16));
#endif
}

}  // namespace OSL_ISA
}  // namespace osl
