// Writes the scales of one block of rows and up to kLanes columns, and stages its zero points.
#pragma once

#include "quantize/half.h"
#include "quantize/kernel.h"

namespace osl {
namespace OSL_ISA {

inline void write_scales(const OslTileArgs& args, const float* scales, int64_t block, int64_t column, int64_t lanes) {
    const bool by_row = args.layout == OSL_BLOCKED_KN;
    const int64_t blocks = block_count(args), first_column = args.first_column + column;
    const int64_t start = by_row ? block * args.total_columns + first_column : first_column * blocks + block;
    const int64_t step = by_row ? 1 : blocks;
    for (int64_t n = 0; n < lanes; n++) {
        if (args.scale_dtype == OSL_FLOAT16)
            ((uint16_t*)args.scales)[start + n * step] = half_bits(scales[n]);
        else
            ((float*)args.scales)[start + n * step] = scales[n];
    }
}

inline void stage_zero_points(const OslTileArgs& args, const float* zeros, uint8_t* staged, int64_t block,
                              int64_t column, int64_t lanes) {
    const bool by_row = args.layout == OSL_BLOCKED_KN;
    const int64_t blocks = block_count(args);
    const int64_t start = by_row ? block * args.columns + column : column * blocks + block;
    const int64_t step = by_row ? 1 : blocks;
    for (int64_t n = 0; n < lanes; n++) staged[start + n * step] = (uint8_t)zeros[n];
}

}  // namespace OSL_ISA
}  // namespace osl
