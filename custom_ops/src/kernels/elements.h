// Elements of activations and results: three types in memory, float in registers.
#pragma once

#include "kernels/matmul.h"
#include "quantize/widen.h"

namespace osl {
namespace OSL_ISA {

static inline int32_t element_bytes(ElementType type) { return type == kFloat32 ? 4 : 2; }

static inline const uint8_t* element_at(const void* base, ElementType type, int64_t index) {
    return (const uint8_t*)base + index * element_bytes(type);
}

// To the nearest, ties to even; what is too large becomes infinite.
static inline Words half_from_float(Floats x) {
    const Ints bits = (Ints)x, size = bits & 0x7FFFFFFF;
    const Ints normal = ((size + 0xFFF + ((size >> 13) & 1)) >> 13) - (112 << 10);
    // Below 2^-14 halves are 2^-24 apart: adding 0.5 aligns the float's own last bit with theirs.
    const Ints subnormal = (Ints)((Floats)size + 0.5f) - (Ints)splat(0.5f);
    Ints half = size < 0x38800000 ? subnormal : normal;
    half = size >= 0x477FF000 ? splat_int(0x7C00) : half;
    half = size > 0x7F800000 ? splat_int(0x7E00) : half;
    return (Words)(half | ((bits >> 16) & 0x8000));
}

static inline Words bfloat_from_float(Floats x) {
    const Ints bits = (Ints)x;
    const Ints rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF;
    const Ints quiet = ((bits >> 16) | 0x40) & 0xFFFF;
    return (Words)((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
}

// kWidth elements.
static inline Floats load_elements(ElementType type, const void* from) {
    if (type == kFloat32) return widen_float32(from);
    return type == kFloat16 ? widen_float16(from) : widen_bfloat16(from);
}

static inline void store_elements(ElementType type, void* to, Floats x) {
    if (type == kFloat32) return store(to, x);
    store(to, __builtin_convertvector(type == kFloat16 ? half_from_float(x) : bfloat_from_float(x), Halves));
}

// `count` elements as floats, followed by zeros up to `padded`, a multiple of every vector width.
static inline void load_row(ElementType type, const uint8_t* from, int64_t count, int64_t padded, float* to) {
    const int32_t bytes = element_bytes(type);
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, load_elements(type, from + i * bytes));
    if (i < count) {
        alignas(64) uint8_t tail[4 * kWidth] = {};
        memcpy(tail, from + i * bytes, (size_t)((count - i) * bytes));
        store(to + i, load_elements(type, tail));
        i += kWidth;
    }
    for (; i < padded; i += kWidth) store(to + i, Floats{});
}

}  // namespace OSL_ISA
}  // namespace osl
