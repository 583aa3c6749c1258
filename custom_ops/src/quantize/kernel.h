// What the interface hands to the kernels of one instruction set.
#pragma once

#include <stdint.h>

#include "interface/onnxslim_native.h"

namespace osl {

// Columns that are quantized side by side; a multiple of every vector width.
constexpr int kLanes = 16;

// Memory of one call, allocated by the interface because the kernels use nothing of the C++ library: an inline function
// compiled for AVX-512 must never be the copy that the linker keeps for every machine.
struct TileScratch {
    float* panel;           // [block][kLanes], 64-byte aligned
    int32_t* codes;         // [block][kLanes], 64-byte aligned
    uint8_t* zero_points;   // [columns][blocks] (OSL_BLOCKED_KN: [blocks][columns]), one per byte
    double* column_error;   // [columns], zeroed
    double* column_weight;  // [columns], zeroed
};

static inline int64_t block_count(const OslTileArgs& args) { return (args.rows + args.block - 1) / args.block; }

using QuantizeTile = void (*)(const OslTileArgs& args, const TileScratch& scratch, OslTileStats* stats);

namespace scalar {
void quantize_tile(const OslTileArgs& args, const TileScratch& scratch, OslTileStats* stats);
}
#ifdef OSL_X86_KERNELS
namespace avx2 {
void quantize_tile(const OslTileArgs& args, const TileScratch& scratch, OslTileStats* stats);
}
namespace avx512 {
void quantize_tile(const OslTileArgs& args, const TileScratch& scratch, OslTileStats* stats);
}
#endif

}  // namespace osl
