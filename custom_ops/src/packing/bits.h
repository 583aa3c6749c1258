// Codes of 2, 3, 4 or 8 bits as a little-endian bit stream: code i occupies bits [i * bits, (i + 1) * bits).
#pragma once

#include <stdint.h>

#include "interface/onnxslim_native.h"

namespace osl {

// The ONNX layouts have no 3-bit type: such codes travel in 4 bits.
static inline int storage_bits(const OslTileArgs& args) {
    return args.bits == 3 && args.layout != OSL_NBITS ? 4 : args.bits;
}

// Adds a code to zero-filled memory.
static inline void or_code(uint8_t* base, int64_t bit, uint32_t code) {
    const uint32_t shifted = code << (bit & 7);
    base[bit >> 3] |= (uint8_t)shifted;
    if (shifted >> 8) base[(bit >> 3) + 1] |= (uint8_t)(shifted >> 8);
}

static inline int64_t bytes_for(int64_t codes, int bits) { return (codes * bits + 7) / 8; }

}  // namespace osl
