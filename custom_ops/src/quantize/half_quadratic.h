// Scale of a block by half-quadratic splitting, without data.
//
// The error of a block is sum d[k] * |w - scale * (code - zero)|^(1/2). With e standing for the residual, two steps
// alternate: e is the residual shrunk towards 0, which takes the large ones out, and the scale is the least-squares one
// for the weights w - e. The best scale seen is kept. The zero point stays: re-estimated as the mean of
// code - (w - e) / scale, an integer one rounds back to itself unless most of the block is clipped.
#pragma once

#include "quantize/affine.h"
#include "quantize/weigh.h"

namespace osl {
namespace OSL_ISA {

constexpr int kSplittingSteps = 20;
// Of the quadratic term: residuals below kSplittingWeight^(-2/3), a quarter of a step, are shrunk to 0.
constexpr float kSplittingWeight = 8.0f;

struct Split {
    Floats error;  // of the affine map that was split
    Floats scale;  // the next one
};

template <bool kWeighted>
Split split(const Scheme& scheme, const float* panel, const float* importance, int64_t rows, const Affine& affine) {
    Floats error = {}, correlation = {}, energy = {};
    const Floats size = absolute(affine.scale);
    const Floats shrinkage = size * square_root(size) * (1.0f / kSplittingWeight);
    for (int64_t k = 0; k < rows; k++) {
        const Floats x = load<Floats>(panel + k * kLanes);
        const Floats code = centred_code(scheme, affine, x);
        const Floats residual = x - affine.scale * code;
        const Floats distance = absolute(residual);
        const Floats root = square_root(distance);
        const Floats outlier = maximum(distance - shrinkage / select(root > 0.0f, root, splat(1.0f)), Floats{});
        const Floats weighted = weigh<kWeighted>(importance, k, code);
        error += weigh<kWeighted>(importance, k, root);
        correlation += weighted * (x - with_sign(outlier, residual));
        energy += weighted * code;
    }
    return {error, correlation / select(energy > 0.0f, energy, splat(1.0f))};
}

template <bool kWeighted>
Affine split_scale(const Scheme& scheme, const Unit& unit, Range range, const float* panel, const float* importance,
                   int64_t rows) {
    Affine best = round_to_nearest(scheme, unit, range), candidate = best;
    Floats best_error = splat(__builtin_inff());
    for (int step = 0; step <= kSplittingSteps; step++) {
        const Split found = split<kWeighted>(scheme, panel, importance, rows, candidate);
        const Ints better = found.error < best_error;
        best_error = select(better, found.error, best_error);
        best.scale = select(better, candidate.scale, best.scale);
        best.inverse = select(better, candidate.inverse, best.inverse);
        const Affine next = affine_of(scheme, unit, found.scale, candidate.zero);
        if (!any(next.scale != candidate.scale)) break;  // every later step would repeat this one
        candidate = next;
    }
    return best;
}

}  // namespace OSL_ISA
}  // namespace osl
