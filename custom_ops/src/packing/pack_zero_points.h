// Staged zero points, one per byte, to the bytes of the tensor. Layouts: see layout.py.
#pragma once

#include "packing/bits.h"
#include "quantize/kernel.h"

namespace osl {

inline void pack_zero_points(const OslTileArgs& args, const uint8_t* staged) {
    const int bits = storage_bits(args);
    const int64_t blocks = block_count(args);
    const bool by_row = args.layout == OSL_BLOCKED_KN;
    const int64_t outer = by_row ? blocks : args.columns, inner = by_row ? args.columns : blocks;
    for (int64_t i = 0; i < outer; i++) {
        int64_t bit = 0;
        if (args.layout == OSL_NBITS) bit = (args.first_column + i) * bytes_for(blocks, bits) * 8;
        if (args.layout == OSL_BLOCKED_NK) bit = (args.first_column + i) * blocks * bits;
        if (args.layout == OSL_BLOCKED_KN) bit = (i * args.total_columns + args.first_column) * bits;
        for (int64_t j = 0; j < inner; j++) or_code(args.zero_points, bit + j * bits, staged[i * inner + j]);
    }
}

}  // namespace osl
