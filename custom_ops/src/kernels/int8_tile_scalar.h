// The int8 mode in portable code: what the other instruction sets must match bit for bit.
#pragma once

#include "kernels/decode.h"

namespace osl {
namespace OSL_ISA {

// sums[r] += float(sum over the block of a * (code - zero)) * (weight scale * activation scale), block after block.
template <int32_t kBits>
static inline void int8_chunk(const PackedWeight& w, const uint8_t* chunk, const Int8Rows& a, int64_t k0, float* sums) {
    const int32_t block = activation_block(w);
    for (int32_t k = 0; k < w.chunk_rows; k += block) {
        const int32_t in_chunk = k / w.scheme.block;
        alignas(64) float scales[kStripColumns];
        int32_t codes[kDotRows][kStripColumns], zeros[kStripColumns];
        for (int32_t c = 0; c < kStripColumns; c += kWidth) {
            store(scales + c, block_scales(w, chunk, in_chunk, c));
            for (int32_t i = 0; i < block; i++)
                store(codes[i] + c, row_codes<kBits>(chunk, k / kDotRows, k % kDotRows + i, c));
        }
        for (int32_t c = 0; c < kStripColumns; c++) zeros[c] = zero_point(w, chunk, in_chunk, c);
        for (int32_t r = 0; r < a.rows; r++) {
            const int64_t at = (k0 + k) / block * a.rows + r;
            const int8_t* x = a.codes + ((k0 + k) / kDotRows * a.rows + r) * kDotRows + k % kDotRows;
            int32_t dot[kStripColumns];
            for (int32_t c = 0; c < kStripColumns; c++)
                dot[c] = w.scheme.zero_points ? zeros[c] * a.offsets[at] : a.offsets[at];
            for (int32_t i = 0; i < block; i++)
                for (int32_t c = 0; c < kStripColumns; c++) dot[c] += codes[i][c] * x[i];
            for (int32_t c = 0; c < kStripColumns; c++)
                sums[r * kStripColumns + c] += (float)dot[c] * (scales[c] * a.scales[at]);
        }
    }
}

constexpr int64_t kPairedRows = 0;

static inline void int8_tile(const PackedWeight& w, const uint8_t* strip, const Int8Rows& a, int32_t, float* sums) {
    memset(sums, 0, (size_t)(a.rows * kStripColumns) * sizeof(float));
    for (int32_t c = 0; c < w.chunks; c++, strip += w.chunk_bytes) {
        const int64_t k0 = (int64_t)c * w.chunk_rows;
        switch (w.scheme.bits) {
            case 8:
                int8_chunk<8>(w, strip, a, k0, sums);
                break;
            case 4:
                int8_chunk<4>(w, strip, a, k0, sums);
                break;
            case 3:
                int8_chunk<3>(w, strip, a, k0, sums);
                break;
            default:
                int8_chunk<2>(w, strip, a, k0, sums);
        }
    }
}

}  // namespace OSL_ISA
}  // namespace osl
