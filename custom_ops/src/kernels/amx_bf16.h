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
            uint8_t* tile = scratch + activation_tile(w, row_tiles, k / kPanelRows, row / 16, k % kPanelRows / kTileK);
            const int64_t left = row < p.m ? w.rows - k : 0;
            const uint8_t* x = from + k * element_bytes(p.type);
            alignas(64) float padded[kTileK];
            if (left < kTileK || p.type != kFloat32) {
                load_row(p.type, x, left < 0 ? 0 : left < kTileK ? left : kTileK, kTileK, padded);
                x = (const uint8_t*)padded;
            }
            const __m512bh packed = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 64), _mm512_loadu_ps(x));
            _mm512_store_si512(tile + row % 16 * 64, (__m512i)packed);
        }
    }
}

// Two vectors of floats as pairs of bfloat16, halves rounded up: fewer steps than the instruction takes that rounds
// them to even and then needs its result reordered.
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

// Half `half` of a chunk as a B tile: its row p holds the rows 2 p and 2 p + 1 of K for each of the 16 columns.
// `ahead` bytes further on lies what will be decoded a pass over the block later: time enough to fetch it.
static inline void decode_tile_4bit(const PackedWeight& w, const uint8_t* chunk, int32_t half, int64_t ahead,
                                    uint8_t* tile) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const BlockAffine low = block_affine(w, chunk, (half * kDotRows) >> w.block_shift);
    const BlockAffine high = w.scheme.block < kDotRows ? block_affine(w, chunk, half * 2 + 1) : low;
#pragma GCC unroll 4
    for (int32_t j = 0; j < 4; j++) {
        const __m512i v = _mm512_loadu_si512(chunk + half * 256 + j * 64);
#define OSL_WEIGHT(shift, affine) \
    _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(v, shift), codes), affine.scale, affine.offset)
        _mm512_store_si512(tile + (2 * j) * 64, bf16_pairs(OSL_WEIGHT(0, low), OSL_WEIGHT(8, low)));
        _mm512_store_si512(tile + (2 * j + 1) * 64, bf16_pairs(OSL_WEIGHT(16, low), OSL_WEIGHT(24, low)));
        _mm512_store_si512(tile + (8 + 2 * j) * 64, bf16_pairs(OSL_WEIGHT(4, high), OSL_WEIGHT(12, high)));
        _mm512_store_si512(tile + (8 + 2 * j + 1) * 64, bf16_pairs(OSL_WEIGHT(20, high), OSL_WEIGHT(28, high)));
#undef OSL_WEIGHT
    }
    // Five lines: the codes of a half, and its share of the scales.
    for (int32_t line = 0; line < 5; line++)
        _mm_prefetch((const char*)chunk + ahead + (half * 5 + line) * 64, _MM_HINT_T1);
}

static inline void decode_tile_any(const PackedWeight& w, const uint8_t* chunk, int32_t half, uint8_t* tile) {
    alignas(64) float weights[kDotRows * kStripColumns];
    decode_half_any(w, chunk, half, weights);
    for (int32_t k = 0; k < kDotRows; k += 2)
        _mm512_store_si512(tile + k / 2 * 64, bf16_pairs(_mm512_load_ps(weights + k * kStripColumns),
                                                         _mm512_load_ps(weights + (k + 1) * kStripColumns)));
}

// Dequantizes a panel tile by tile, between tile products: those leave the vector units idle. A panel has the tiles
// [k][strip] of one or two strips.
class PanelDecoder {
public:
    explicit PanelDecoder(const PackedWeight& w) : w_(w), halves_(w.chunk_rows / kDotRows) {}

    void begin(int64_t strip, int64_t strips, int64_t k, int64_t k_tiles, int64_t ahead, uint8_t* panel) {
        ahead_ = ahead;
        half_ = (int32_t)(k % w_.chunk_rows) / kDotRows;
        chunk_ = w_.strips + strip * w_.strip_bytes + k / w_.chunk_rows * w_.chunk_bytes;
        strips_ = strips;
        strip_ = 0;
        tile_ = panel;
        tiles_ = left_ = strips * k_tiles;
        credit_ = 0;
    }

    // One of `products` tile products is done: decodes as much as is due.
    void keep_pace(int64_t products) {
        for (credit_ += tiles_; credit_ >= products && left_ > 0; credit_ -= products) step();
    }

    void finish() {
        while (left_ > 0) step();
    }

private:
    void step() {
        left_--;
        const uint8_t* chunk = chunk_ + strip_ * w_.strip_bytes;
        if (w_.scheme.bits == 4)
            decode_tile_4bit(w_, chunk, half_, ahead_, tile_);
        else
            decode_tile_any(w_, chunk, half_, tile_);
        tile_ += kTileBytes;
        if (++strip_ < strips_) return;
        strip_ = 0;
        if (++half_ < halves_) return;
        half_ = 0;
        chunk_ += w_.chunk_bytes;
    }

    const PackedWeight& w_;
    const int32_t halves_;
    int32_t half_ = 0;
    const uint8_t* chunk_ = nullptr;
    uint8_t* tile_ = nullptr;
    int64_t strip_ = 0, strips_ = 0, tiles_ = 0, left_ = 0, credit_ = 0, ahead_ = 0;
};

// sums (kM x kN tiles) [+]= activations (kM tiles of rows, `row_step` bytes apart) * panel ([k][kN] tiles).
template <int32_t kM, int32_t kN>
static inline void multiply_tiles(const uint8_t* a, int64_t row_step, const uint8_t* panel, int64_t k_tiles,
                                  bool accumulate, float* sums, PanelDecoder& next, int64_t products) {
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
        next.keep_pace(products);
    }
    _tile_stored(0, sums, 64);
    if (kN == 2) _tile_stored(1, sums + kTileFloats, 64);
    if (kM == 2) _tile_stored(2, sums + kN * kTileFloats, 64);
    if (kM == 2 && kN == 2) _tile_stored(3, sums + 3 * kTileFloats, 64);
}

// What becomes of the sums of a panel's strips when K is through.
struct BlockEpilogue {
    const MatMulProblem& p;
    const float* low_rank;
    int64_t strip;
    int64_t first_row;  // of the block

    // Brings what will be written of `rows` rows of y into the cache.
    void fetch(int64_t row, int64_t rows) const {
        const StripColumns columns = columns_of_strip(p.b, strip);
        const int64_t end = first_row + row + rows < p.m ? first_row + row + rows : p.m;
        for (int64_t r = first_row + row; r < end; r++) {
            const uint8_t* to = (const uint8_t*)p.y + (r * p.y_stride + columns.first) * element_bytes(p.type);
            __builtin_prefetch(to, 1);
            __builtin_prefetch(to + 64, 1);
        }
    }

    template <int32_t kN>
    void finish(int64_t row, int64_t row_tiles, float* sums) const {
        for (int64_t i = 0; i < row_tiles; i++, sums += kN * kTileFloats) {
            const int64_t r = first_row + row + i * 16;
            finish_rows(p, low_rank, r, group_rows(p.m, r), strip, sums, kTileFloats);
            if (kN == 2 && p.activation < kSiluGate)
                finish_rows(p, low_rank, r, group_rows(p.m, r), strip + 1, sums + kTileFloats, kTileFloats);
        }
    }
};

// All tiles of rows of one block against one panel, while the next panel is dequantized. The epilogue follows each
// product at once: its stores then drain behind the next product.
template <int32_t kN>
static inline void multiply_rows(const uint8_t* a, int64_t row_tiles, int64_t row_step, const uint8_t* panel,
                                 int64_t k_tiles, bool accumulate, float* sums, PanelDecoder& next,
                                 const BlockEpilogue* epilogue) {
    const int64_t products = (row_tiles + 1) / 2 * k_tiles;
    int64_t i = 0;
    for (; i + 2 <= row_tiles; i += 2) {
        float* to = sums + i * kN * kTileFloats;
        if (epilogue != nullptr) epilogue->fetch(i * 16, 32);
        multiply_tiles<2, kN>(a + i * row_step, row_step, panel, k_tiles, accumulate, to, next, products);
        if (epilogue != nullptr) epilogue->finish<kN>(i * 16, 2, to);
    }
    if (i < row_tiles) {
        float* to = sums + i * kN * kTileFloats;
        multiply_tiles<1, kN>(a + i * row_step, row_step, panel, k_tiles, accumulate, to, next, products);
        if (epilogue != nullptr) epilogue->finish<kN>(i * 16, 1, to);
    }
    next.finish();
}

// Strips [first, last) for the row tiles [row_tile, row_tile + row_tiles).
static inline void amx_block(const MatMulProblem& p, const MatMulPlan& plan, const uint8_t* scratch, uint8_t* own,
                             int64_t first, int64_t last, int64_t row_tile, int64_t row_tiles) {
    const PackedWeight& w = p.b;
    const int64_t all_tiles = (p.m + 15) / 16, pair_floats = row_tiles * 2 * kTileFloats;
    constexpr int64_t kPanelBytes = 2 * kPanelTiles * kTileBytes;
    uint8_t *panel = own, *next_panel = own + kPanelBytes;
    float* sums = (float*)(own + 2 * kPanelBytes);
    const auto tiles_from = [&](int64_t k) {
        const int64_t left = (w.padded_rows - k) / kTileK;
        return left < kPanelTiles ? left : kPanelTiles;
    };
    // From one panel of a strip to the next one, and from its last to the first of the same strip of the next block.
    const auto ahead_of = [&](int64_t k) {
        if (k + kPanelRows < w.padded_rows) return (int64_t)(kPanelRows * w.chunk_bytes / w.chunk_rows);
        return kBlockStrips * w.strip_bytes - k / w.chunk_rows * w.chunk_bytes;
    };
    PanelDecoder next(w);
    next.begin(first, last - first > 1 ? 2 : 1, 0, tiles_from(0), ahead_of(0), panel);
    next.finish();
    for (int64_t k = 0; k < w.padded_rows; k += kPanelRows) {
        const int64_t k_tiles = tiles_from(k), row_step = k_tiles * kTileBytes;
        const uint8_t* a = scratch + activation_tile(w, all_tiles, k / kPanelRows, row_tile, 0);
        for (int64_t strip = first; strip < last; strip += 2) {
            const bool wrap = strip + 2 >= last;
            const int64_t next_strip = wrap ? first : strip + 2, next_k = wrap ? k + kPanelRows : k;
            if (next_k < w.padded_rows)
                next.begin(next_strip, last - next_strip > 1 ? 2 : 1, next_k, tiles_from(next_k), ahead_of(next_k),
                           next_panel);
            float* to = sums + (strip - first) / 2 * pair_floats;
            const bool whole = k + kPanelRows >= w.padded_rows;
            const BlockEpilogue epilogue = {p, (const float*)(scratch + plan.low_rank_at), strip, row_tile * 16};
            if (strip + 1 < last)
                multiply_rows<2>(a, row_tiles, row_step, panel, k_tiles, k > 0, to, next, whole ? &epilogue : nullptr);
            else
                multiply_rows<1>(a, row_tiles, row_step, panel, k_tiles, k > 0, to, next, whole ? &epilogue : nullptr);
            uint8_t* const spent = panel;
            panel = next_panel;
            next_panel = spent;
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
