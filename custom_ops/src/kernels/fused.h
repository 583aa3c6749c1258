// a * b + c: one rounding where the instruction set has it. Only for results that are bounded, not bit-equal.
#pragma once

#include "quantize/lanes.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace osl {
namespace OSL_ISA {

static inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

}  // namespace OSL_ISA
}  // namespace osl
