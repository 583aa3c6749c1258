// Many rows with AMX: weights dequantized to bfloat16 panels that stay in the first-level cache, sums in float.
//
// Blocking: the unit's columns are taken kBlockStrips strips at a time, K in chunks of kPanelRows. One chunk of the
// activations (all rows, contiguous) then stays in the second-level cache while the panels of the block pass, and each
// weight is dequantized once for all rows of a row block. Sums wait in tiles between the chunks.
#pragma once

#include "kernels/decode.h"
#include "kernels/epilogue.h"

namespace osl {
namespace OSL_ISA {

constexpr int32_t kTileBytes = 1024;  // 16 rows of 64 bytes
constexpr int32_t kTileFloats = kTileBytes / 4;
constexpr int32_t kTileK = 32;  // bfloat16 elements of a tile's row
constexpr int32_t kPanelTiles = kPanelRows / kTileK;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC's intrinsic declares only the first 8 bytes as read.
static inline void configure_tiles() {
    const TileConfig config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

// Tile (chunk, 16 rows, 32 k) of the packed activations: [chunks of K][tiles of rows][tiles of K][16][32].
static inline int64_t activation_tile(const PackedWeight& w, int64_t row_tiles, int64_t chunk, int64_t row_tile,
                                      int64_t k_tile) {
    const int64_t left = w.padded_rows / kTileK - chunk * kPanelTiles;
    const int64_t tiles = left < kPanelTiles ? left : kPanelTiles;
    return (chunk * row_tiles * kPanelTiles + row_tile * tiles + k_tile) * kTileBytes;
}

static inline void prepare_bf16(const MatMulProblem& p, uint8_t* scratch, int64_t first, int64_t last) {
    const PackedWeight& w = p.b;
    const int64_t row_tiles = (p.m + 15) / 16, whole = last == p.m ? row_tiles * 16 : last;
    for (int64_t row = first; row < whole; row++) {
        const uint8_t* from = element_at(p.a, p.type, row * p.a_stride);
        for (int64_t k = 0; k < w.padded_rows; k += kTileK) {
            alignas(64) float x[kTileK] = {};
            const int64_t left = w.rows - k;
            const int64_t count = left < 0 || row >= p.m ? 0 : left < kTileK ? left : kTileK;
            load_row(p.type, from + k * element_bytes(p.type), count, kTileK, x);
            uint8_t* tile = scratch + activation_tile(w, row_tiles, k / kPanelRows, row / 16, k % kPanelRows / kTileK);
            const __m512bh packed = _mm512_cvtne2ps_pbh(_mm512_load_ps(x + 16), _mm512_load_ps(x));
            _mm512_store_si512(tile + row % 16 * 64, (__m512i)packed);
        }
    }
}

// Two vectors of floats as pairs of bfloat16, halves rounded up.
static inline __m512i bf16_pairs(__m512 even, __m512 odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)even, half), 16);
    return _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_add_epi32((__m512i)odd, half));
}

struct BlockAffine {
    __m512 scale;
    __m512 offset;  // -zero point * scale
};

static inline BlockAffine block_affine(const PackedWeight& w, const uint8_t* chunk, int32_t block) {
    const __m512 scale = (__m512)block_scales(w, chunk, block, 0);
    return {scale, _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_setzero_ps(), (__m512)block_zeros(w, chunk, block, 0)))};
}

// Half `half` of a chunk as a B tile: row p holds the rows 2 p and 2 p + 1 of K for each of the 16 columns.
static inline void decode_tile_4bit(const PackedWeight& w, const uint8_t* chunk, int32_t half, uint8_t* tile) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    BlockAffine affine[2];
    affine[0] = block_affine(w, chunk, (half * kDotRows) >> w.block_shift);
    affine[1] = w.scheme.block < kDotRows ? block_affine(w, chunk, half * 2 + 1) : affine[0];
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; j++) {
        const __m512i v = _mm512_loadu_si512(chunk + half * 256 + j * 64);
#define OSL_WEIGHT(shift, part)                                                                                 \
    _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(v, shift), codes), affine[part].scale, affine[part].offset)
        _mm512_store_si512(tile + (2 * j) * 64, bf16_pairs(OSL_WEIGHT(0, 0), OSL_WEIGHT(8, 0)));
        _mm512_store_si512(tile + (2 * j + 1) * 64, bf16_pairs(OSL_WEIGHT(16, 0), OSL_WEIGHT(24, 0)));
        _mm512_store_si512(tile + (8 + 2 * j) * 64, bf16_pairs(OSL_WEIGHT(4, 1), OSL_WEIGHT(12, 1)));
        _mm512_store_si512(tile + (8 + 2 * j + 1) * 64, bf16_pairs(OSL_WEIGHT(20, 1), OSL_WEIGHT(28, 1)));
#undef OSL_WEIGHT
    }
}

static inline void decode_tile(const PackedWeight& w, const uint8_t* chunk, int32_t half, uint8_t* tile) {
    if (w.scheme.bits == 4) return decode_tile_4bit(w, chunk, half, tile);
    alignas(64) float weights[kDotRows * kStripColumns];
    decode_half_any(w, chunk, half, weights);
    for (int32_t k = 0; k < kDotRows; k += 2)
        _mm512_store_si512(tile + k / 2 * 64, bf16_pairs(_mm512_load_ps(weights + k * kStripColumns),
                                                         _mm512_load_ps(weights + (k + 1) * kStripColumns)));
}

// `tiles` tiles of K from row k of one strip, each `stride` bytes after the other.
static inline void decode_panel(const PackedWeight& w, int64_t strip, int64_t k, int64_t tiles, int32_t stride,
                                uint8_t* panel) {
    const uint8_t* chunk = w.strips + strip * w.strip_bytes + k / w.chunk_rows * w.chunk_bytes;
    const int32_t halves = w.chunk_rows / kDotRows;
    int32_t half = (int32_t)(k % w.chunk_rows) / kDotRows;
    for (int64_t i = 0; i < tiles; i++, panel += stride) {
        for (int32_t line = 0; line < 320; line += 64)
            _mm_prefetch((const char*)chunk + 4096 + half * 320 + line, _MM_HINT_T0);
        decode_tile(w, chunk, half, panel);
        if (++half == halves) {
            half = 0;
            chunk += w.chunk_bytes;
        }
    }
}

// sums (kM x kN tiles) [+]= activations (kM tiles of rows, `row_step` bytes apart) * panel ([k][kN] tiles).
template <int32_t kM, int32_t kN>
static inline void multiply_tiles(const uint8_t* a, int64_t row_step, const uint8_t* panel, int64_t k_tiles,
                                  bool accumulate, float* sums) {
    if (accumulate) {
        _tile_loadd(0, sums, 64);
        if (kN == 2) _tile_loadd(1, sums + kTileFloats, 64);
        if (kM == 2) _tile_loadd(2, sums + kN * kTileFloats, 64);
        if (kM == 2 && kN == 2) _tile_loadd(3, sums + 3 * kTileFloats, 64);
    } else {
        _tile_zero(0);
        if (kN == 2) _tile_zero(1);
        if (kM == 2) _tile_zero(2);
        if (kM == 2 && kN == 2) _tile_zero(3);
    }
    for (int64_t k = 0; k < k_tiles; k++, a += kTileBytes, panel += kN * kTileBytes) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (kN == 2) {
            _tile_loadd(7, panel + kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (kM == 2) {
            _tile_loadd(5, a + row_step, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (kN == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    if (kN == 2) _tile_stored(1, sums + kTileFloats, 64);
    if (kM == 2) _tile_stored(2, sums + kN * kTileFloats, 64);
    if (kM == 2 && kN == 2) _tile_stored(3, sums + 3 * kTileFloats, 64);
}

// All tiles of rows of one block against one panel.
template <int32_t kN>
static inline void multiply_rows(const uint8_t* a, int64_t row_tiles, int64_t row_step, const uint8_t* panel,
                                 int64_t k_tiles, bool accumulate, float* sums) {
    int64_t i = 0;
    for (; i + 2 <= row_tiles; i += 2)
        multiply_tiles<2, kN>(a + i * row_step, row_step, panel, k_tiles, accumulate, sums + i * kN * kTileFloats);
    if (i < row_tiles)
        multiply_tiles<1, kN>(a + i * row_step, row_step, panel, k_tiles, accumulate, sums + i * kN * kTileFloats);
}

// Strips [first, last) for the row tiles [row_tile, row_tile + row_tiles).
static inline void amx_block(const MatMulProblem& p, const MatMulPlan& plan, const uint8_t* scratch, uint8_t* own,
                             int64_t first, int64_t last, int64_t row_tile, int64_t row_tiles) {
    const PackedWeight& w = p.b;
    const int64_t all_tiles = (p.m + 15) / 16, pair_floats = row_tiles * 2 * kTileFloats;
    uint8_t* panel = own;
    float* sums = (float*)(own + 2 * kPanelTiles * kTileBytes);
    for (int64_t k = 0; k < w.padded_rows; k += kPanelRows) {
        const int64_t left = (w.padded_rows - k) / kTileK, k_tiles = left < kPanelTiles ? left : kPanelTiles;
        const uint8_t* a = scratch + activation_tile(w, all_tiles, k / kPanelRows, row_tile, 0);
        for (int64_t strip = first; strip < last; strip += 2) {
            float* to = sums + (strip - first) / 2 * pair_floats;
            if (strip + 1 < last) {
                decode_panel(w, strip, k, k_tiles, 2 * kTileBytes, panel);
                decode_panel(w, strip + 1, k, k_tiles, 2 * kTileBytes, panel + kTileBytes);
                multiply_rows<2>(a, row_tiles, k_tiles * kTileBytes, panel, k_tiles, k > 0, to);
            } else {
                decode_panel(w, strip, k, k_tiles, kTileBytes, panel);
                multiply_rows<1>(a, row_tiles, k_tiles * kTileBytes, panel, k_tiles, k > 0, to);
            }
        }
    }
    const float* low_rank = (const float*)(scratch + plan.low_rank_at);
    const bool gate = p.activation >= kSiluGate;
    for (int64_t strip = first; strip < last; strip += 2) {
        float* tiles = sums + (strip - first) / 2 * pair_floats;
        const int64_t wide = strip + 1 < last ? 2 : 1;
        for (int64_t i = 0; i < row_tiles; i++, tiles += wide * kTileFloats) {
            const int64_t row = (row_tile + i) * 16;
            const int32_t rows = group_rows(p.m, row);
            finish_rows(p, low_rank, row, rows, strip, tiles, kTileFloats);
            if (wide == 2 && !gate) finish_rows(p, low_rank, row, rows, strip + 1, tiles + kTileFloats, kTileFloats);
        }
    }
}

static inline void run_bf16(const MatMulProblem& p, const MatMulPlan& plan, const uint8_t* scratch, int64_t first,
                            int64_t last) {
    configure_tiles();
    uint8_t* own = const_cast<uint8_t*>(scratch) + plan.units_at + first / plan.strips_per_run_unit * plan.unit_bytes;
    const int64_t row_tiles = (p.m + 15) / 16;
    for (int64_t strip = first; strip < last; strip += kBlockStrips) {
        const int64_t end = strip + kBlockStrips < last ? strip + kBlockStrips : last;
        for (int64_t row = 0; row < row_tiles; row += kBlockRowTiles) {
            const int64_t count = row_tiles - row < kBlockRowTiles ? row_tiles - row : kBlockRowTiles;
            amx_block(p, plan, scratch, own, strip, end, row, count);
        }
    }
    _tile_release();
}

}  // namespace OSL_ISA
}  // namespace osl
