// Vectors of the instruction set that this file is compiled for. Every operation is one IEEE operation per lane, so the
// width never changes a result.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace osl {
namespace OSL_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

template <class Vector>
inline Vector load(const void* from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class Vector>
inline void store(void* to, const Vector& v) {
    memcpy(to, &v, sizeof v);
}

inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat_int(int32_t x) { return x - Ints{}; }
inline Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
inline Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
inline Floats clamp(Floats x, Floats low, Floats high) { return minimum(maximum(x, low), high); }
inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7FFFFFFF); }
inline Floats with_sign(Floats size, Floats of) { return (Floats)((Ints)size | ((Ints)of & ~0x7FFFFFFF)); }

// Rounds to the nearest integer, ties to even, for |x| <= 2^22: beyond 1.5 * 2^23 a float has no fraction left.
inline Floats round_even(Floats x) {
    const Floats shift = splat(12582912.0f);
    return (x + shift) - shift;
}

// Correctly rounded, for x >= 0. Compilers turn the loop into one instruction.
inline Floats square_root(Floats x) {
    float lanes[kWidth];
    store(lanes, x);
    for (int i = 0; i < kWidth; i++) lanes[i] = __builtin_sqrtf(lanes[i]);
    return load<Floats>(lanes);
}

inline bool any(Ints mask) {
    int32_t lanes[kWidth], all = 0;
    store(lanes, mask);
    for (int i = 0; i < kWidth; i++) all |= lanes[i];
    return all != 0;
}

}  // namespace OSL_ISA
}  // namespace osl
