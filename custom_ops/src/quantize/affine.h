// How one block is coded: w ~ scale * (code - zero), worked out in units in which the block's largest weight lies in
// [1, 2). That unit is a power of two, so it changes no digit, and no sum can overflow or underflow.
#pragma once

#include "quantize/half.h"
#include "quantize/kernel.h"
#include "quantize/lanes.h"

namespace osl {
namespace OSL_ISA {

struct Scheme {
    float levels;  // largest code, 2^bits - 1
    float middle;  // 2^(bits - 1): the code of 0 when symmetric
    bool symmetric;
    bool half_scale;
};

inline Scheme scheme_of(const OslTileArgs& args) {
    return {(float)((1 << args.bits) - 1), (float)(1 << (args.bits - 1)), args.symmetric != 0,
            args.scale_dtype == OSL_FLOAT16};
}

// The unit and its inverse, both normal floats.
struct Unit {
    Floats size, inverse;
};

struct Range {
    Floats low, high;  // of the block together with 0
};

struct Affine {
    Floats scale;    // in units, as stored
    Floats inverse;  // 1 / scale, or 0 for a scale of 0
    Floats zero;     // integer in [0, levels]
};

inline Range range_of(const float* panel, int64_t rows) {
    Range range = {};
    for (int64_t k = 0; k < rows; k++) {
        const Floats x = load<Floats>(panel + k * kLanes);
        range.low = minimum(x, range.low);
        range.high = maximum(x, range.high);
    }
    return range;
}

inline Unit unit_of(Range range) {
    const Ints exponent = ((Ints)maximum(range.high, -range.low) >> 23) & 0xFF;
    const Ints low = exponent < 1 ? splat_int(1) : exponent;
    const Ints clamped = low > 253 ? splat_int(253) : low;  // so that the inverse is a normal number too
    return {(Floats)(clamped << 23), (Floats)((254 - clamped) << 23)};
}

inline Floats reciprocal(Floats x) {
    const Ints zero = x == 0.0f;
    return select(zero, splat(0.0f), 1.0f / select(zero, splat(1.0f), x));
}

// `scale` as its stored type holds it.
inline Floats stored_scale(const Scheme& scheme, const Unit& unit, Floats scale) {
    Floats real = scale * unit.size;
    if (scheme.half_scale) real = round_to_half(real);
    return select(real == 0.0f, splat(0.0f), real * unit.inverse);  // never -0
}

inline Affine affine_of(const Scheme& scheme, const Unit& unit, Floats scale, Floats zero) {
    const Floats stored = stored_scale(scheme, unit, scale);
    return {stored, reciprocal(stored), zero};
}

// The scale that spans the range with `levels + slack` steps, before it is rounded to its stored type. Symmetric codes
// run from -middle to middle - 1: the extreme of larger magnitude gets -middle, so a positive one has a negative scale.
inline Floats spanning_scale(const Scheme& scheme, Range range, float slack) {
    if (!scheme.symmetric) return (range.high - range.low) / (scheme.levels + slack);
    const Floats extreme = select(range.high > -range.low, range.high, range.low);
    return extreme / -(scheme.middle + slack);
}

// The integer zero point for a scale; half of the slack lies on either side of the range.
inline Floats spanning_zero(const Scheme& scheme, Range range, Floats inverse, float slack) {
    if (scheme.symmetric) return splat(scheme.middle);
    const Floats zero = clamp(round_even(-range.low * inverse - 0.5f * slack), splat(0.0f), splat(scheme.levels));
    return select(inverse == 0.0f, splat(scheme.middle), zero);
}

// Round to nearest with the whole range representable.
inline Affine round_to_nearest(const Scheme& scheme, const Unit& unit, Range range) {
    Affine affine = affine_of(scheme, unit, spanning_scale(scheme, range, 0.0f), Floats{});
    affine.zero = spanning_zero(scheme, range, affine.inverse, 0.0f);
    return affine;
}

// code - zero, as a float integer
inline Floats centred_code(const Scheme& scheme, const Affine& affine, Floats x) {
    return round_even(clamp(x * affine.inverse, -affine.zero, scheme.levels - affine.zero));
}

}  // namespace OSL_ISA
}  // namespace osl
