// Activations as AMX tiles of bfloat16, in the order in which panels of the weight meet them.
#pragma once

#include "kernels/amx_decode.h"
#include "kernels/kernel_set.h"

namespace osl {
namespace OSL_ISA {

// Rows of K between two visits to the sums. Up to two tiles of rows the sums need no memory at all.
static inline int64_t panel_rows(const MatMulProblem& p) { return p.m <= 32 ? p.b.padded_rows : kPanelRows; }

// Tile (panel, 16 rows, 32 k) of the packed activations: [panels][tiles of rows][tiles of K][16][32].
static inline int64_t activation_tile(const PackedWeight& w, int64_t depth, int64_t row_tiles, int64_t k,
                                      int64_t row_tile) {
    const int64_t panel = k / depth * depth, left = w.padded_rows - panel;
    const int64_t tiles = (left < depth ? left : depth) / kTileK;
    return (panel / kTileK * row_tiles + row_tile * tiles + k % depth / kTileK) * kTileBytes;
}

static inline void prepare_bf16(const MatMulProblem& p, uint8_t* scratch, int64_t first, int64_t last) {
    const PackedWeight& w = p.b;
    const int64_t row_tiles = amx_row_tiles(p.m), depth = panel_rows(p);
    const int64_t end_tile = last == p.m ? row_tiles : last / 16;
    constexpr int64_t kSpan = 128;  // of K at a time, so that whole tiles are written
    for (int64_t row_tile = first / 16; row_tile < end_tile; row_tile++) {
        for (int64_t start = 0; start < w.padded_rows; start += kSpan) {
            const int64_t end = start + kSpan < w.padded_rows ? start + kSpan : w.padded_rows;
            for (int64_t r = 0; r < 16; r++) {
                const int64_t row = row_tile * 16 + r;
                const uint8_t* from = element_at(p.a, p.type, row < p.m ? row * p.a_stride : 0);
                for (int64_t k = start; k < end; k += kTileK) {
                    const int64_t left = row < p.m ? w.rows - k : 0;
                    const uint8_t* x = from + k * element_bytes(p.type);
                    alignas(64) float padded[kTileK];
                    if (left < kTileK || p.type != kFloat32) {
                        load_row(p.type, x, left < 0 ? 0 : left < kTileK ? left : kTileK, kTileK, padded);
                        x = (const uint8_t*)padded;
                    }
                    uint8_t* tile = scratch + activation_tile(w, depth, row_tiles, k, row_tile);
                    const __m512bh packed = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 64), _mm512_loadu_ps(x));
                    _mm512_store_si512(tile + r * 64, (__m512i)packed);
                }
            }
        }
    }
}

}  // namespace OSL_ISA
}  // namespace osl
