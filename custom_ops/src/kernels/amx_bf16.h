// Many rows with AMX: weights dequantized to bfloat16, sums in float.
//
// Blocking: the unit's columns are taken kBlockStrips strips at a time, K in panels of some rows. The steps of a panel
// wait in a ring in the first-level cache until all rows of a block are through; the activations stream past them from
// the second-level cache, with the instruction that leaves the first one alone. Sums stay in tiles for a panel, in
// memory between panels.
#pragma once

#include "kernels/amx_activations.h"
#include "kernels/epilogue.h"
#include "kernels/weight_ring.h"

namespace osl {
namespace OSL_ISA {

// Tiles of the coming panel are made one a step: what fits into the ring from the start, the rest while the last rows
// pass and set places free.
static_assert(2 * (kRingSteps - kPanelRows / kTileK) >= kPanelRows / kTileK, "the ring is too short for its panels");

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

// GCC's intrinsics for tile loads do not say that they read memory.
static inline void order_memory() { __asm__ volatile("" ::: "memory"); }

// Sums of some rows of one or two strips: rows of `stride` bytes.
struct Sums {
    uint8_t* at;
    int64_t stride;
    uint8_t* tile(int32_t m, int32_t n) const { return at + m * 16 * stride + n * 64; }
};

// Tile 2 m + n holds the sums of the m-th 16 rows and the n-th strip.
#define OSL_EACH_SUM(DO)      \
    DO(0, 0, 0);              \
    if (kN == 2) DO(1, 0, 1); \
    if (kM == 2) DO(2, 1, 0); \
    if (kM == 2 && kN == 2) DO(3, 1, 1)

template <int32_t kM, int32_t kN>
static inline void load_sums(const Sums* from) {
    order_memory();
#define OSL_LOAD(t, m, n) _tile_stream_loadd(t, from->tile(m, n), from->stride)
    if (from != nullptr) {
        OSL_EACH_SUM(OSL_LOAD);
        return;
    }
#define OSL_ZERO(t, m, n) _tile_zero(t)
    OSL_EACH_SUM(OSL_ZERO);
}

// Stores each tile of sums and loads those that come next, zeros or nothing.
template <int32_t kM, int32_t kN>
static inline void swap_sums(const Sums& to, const Sums* from) {
    if (from == nullptr) {
#define OSL_STORE(t, m, n)                     \
    _tile_stored(t, to.tile(m, n), to.stride); \
    _tile_zero(t)
#define OSL_STORE_ZERO(t, m, n) \
    {                           \
        OSL_STORE(t, m, n);     \
    }
        OSL_EACH_SUM(OSL_STORE_ZERO);
        return;
    }
#define OSL_SWAP(t, m, n)                                      \
    {                                                          \
        _tile_stored(t, to.tile(m, n), to.stride);             \
        _tile_stream_loadd(t, from->tile(m, n), from->stride); \
    }
    OSL_EACH_SUM(OSL_SWAP);
}

// What will be written next, brought to the cache while a product runs.
struct Coming {
    uint8_t* at;
    int64_t stride;
    int32_t rows_per_step;
};

// kTiles tiles of the ring, made in equal parts after each of kProducts tile products.
template <CodeFormat kFormat, int32_t kTiles, int32_t kProducts>
class Shadow {
public:
    explicit Shadow(WeightRing& ring) : ring_(ring), tile_(ring.begin_tile<kFormat>()) {
        if (kTiles == 2) ring.fetch_near();
    }

    void part(int32_t product) {
        order_memory();
#pragma GCC unroll 8
        for (int32_t i = product * kShare; i < (product + 1) * kShare; i++) {
            if (i == 4) {
                tile_ = ring_.begin_tile<kFormat>();
                ring_.fetch_near();
            }
            tile_.quarter(i % 4);
            if (i % 4 == 3) ring_.end_tile();
        }
        order_memory();
    }

private:
    static constexpr int32_t kShare = 4 * kTiles / kProducts;
    WeightRing& ring_;
    TileInWork<kFormat> tile_;
};

template <CodeFormat kFormat, int32_t kProducts>
class Shadow<kFormat, 0, kProducts> {
public:
    explicit Shadow(WeightRing&) {}
    void part(int32_t) {}
};

// One step of a product, with kTiles tiles of the ring made in its shadow.
template <int32_t kM, int32_t kN, int32_t kTiles, CodeFormat kFormat>
static inline __attribute__((always_inline)) void multiply_step(const uint8_t* a, int64_t row_step,
                                                                const uint8_t* weights, WeightRing& ring) {
    order_memory();
    _tile_stream_loadd(4, a, 64);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    Shadow<kFormat, kTiles, kM * kN> shadow(ring);
    shadow.part(0);
    if (kN == 2) {
        _tile_loadd(7, weights + kTileBytes, 64);
        _tile_dpbf16ps(1, 4, 7);
        shadow.part(1);
    }
    if (kM == 1) return;
    _tile_stream_loadd(5, a + row_step, 64);
    _tile_dpbf16ps(2, 5, 6);
    shadow.part(kN);
    if (kN == 1) return;
    _tile_dpbf16ps(3, 5, 7);
    shadow.part(3);
}

// Adds to the sums in tiles: activations (kM tiles of rows, `row_step` bytes apart) * steps at the front of the ring.
template <int32_t kM, int32_t kN, int32_t kTiles, CodeFormat kFormat>
static inline void multiply_tiles(const uint8_t* a, int64_t row_step, int32_t steps, WeightRing& ring, bool release,
                                  Coming coming) {
    const uint8_t* weights = ring.front();
    for (int32_t k = 0; k < steps; k++, a += kTileBytes, weights = ring.after(weights)) {
        if (ring.spare() >= kTiles)
            multiply_step<kM, kN, kTiles, kFormat>(a, row_step, weights, ring);
        else
            multiply_step<kM, kN, 0, kFormat>(a, row_step, weights, ring);
        for (int32_t row = 0; row < coming.rows_per_step; row++, coming.at += coming.stride) {
            __builtin_prefetch(coming.at, 1);
            if (kN == 2) __builtin_prefetch(coming.at + 64, 1);
        }
        if (release) ring.release();
        if (kTiles == 1) ring.fetch();
    }
}

// What becomes of the sums of a panel's strips when K is through.
struct BlockEpilogue {
    const MatMulProblem& p;
    const float* low_rank;
    int64_t strip;
    int64_t first_row;  // of the block
    bool plain;         // sums are results

    // Whether tiles can be written to y as they are.
    bool direct(int64_t row, int64_t row_tiles) const { return plain && first_row + row + row_tiles * 16 <= p.m; }
    Sums place(int64_t row) const {
        const int64_t at = (first_row + row) * p.y_stride + columns_of_strip(p.b, strip).first;
        return {(uint8_t*)((float*)p.y + at), p.y_stride * 4};
    }

    template <int32_t kN>
    void finish(int64_t row, int64_t row_tiles, const Sums& sums) const {
        for (int64_t i = 0; i < row_tiles; i++) {
            const int64_t r = first_row + row + i * 16;
            const int32_t rows = r < p.m ? group_rows(p.m, r) : 0;
            float* from = (float*)sums.tile((int32_t)i, 0);
            finish_rows(p, low_rank, r, rows, strip, from, kN * kStripColumns, kStripColumns);
            if (kN == 2 && p.activation < kSiluGate)
                finish_rows(p, low_rank, r, rows, strip + 1, from + kStripColumns, kN * kStripColumns, 0);
        }
    }
};

static inline bool sums_are_results(const MatMulProblem& p, int64_t strip, int32_t strips) {
    if (p.activation != kNoActivation || p.residual != nullptr || p.rank > 0 || p.bias != nullptr) return false;
    const StripColumns left = columns_of_strip(p.b, strip), right = columns_of_strip(p.b, strip + strips - 1);
    return p.type == kFloat32 && right.count == kStripColumns &&
           right.first == left.first + (strips - 1) * kStripColumns;
}

// A panel against all tiles of rows of a block.
struct PanelRows {
    const uint8_t* a;
    int64_t row_tiles;
    int32_t steps;
    bool first;                     // the sums begin here
    uint8_t* sums;                  // [rows][kN * 16] floats
    const BlockEpilogue* epilogue;  // null unless K is through

    template <int32_t kN>
    Sums waiting(int64_t row_tile) const {
        return {sums + row_tile * kN * kTileBytes, kN * 64};
    }
    template <int32_t kN>
    Sums result(int64_t row_tile, int64_t tiles) const {
        const bool direct = epilogue != nullptr && epilogue->direct(row_tile * 16, tiles);
        return direct ? epilogue->place(row_tile * 16) : waiting<kN>(row_tile);
    }
    template <int32_t kN>
    void finish(int64_t row_tile, int64_t tiles, const Sums& from) const {
        if (epilogue == nullptr || epilogue->direct(row_tile * 16, tiles)) return;
        order_memory();
        epilogue->finish<kN>(row_tile * 16, tiles, from);
    }

    template <int32_t kN, int32_t kTiles, CodeFormat kFormat>
    void multiply(WeightRing& ring) const {
        const int64_t row_step = steps * kTileBytes;
        const int32_t fetch_rows = (32 + steps - 1) / steps;
        ring.make_ready<kFormat>(steps);
        if (kTiles == 1) ring.begin_fetch((row_tiles + 1) / 2 * steps);
        int64_t i = 0;
        if (row_tiles > 1) {
            const Sums start = waiting<kN>(0);
            load_sums<2, kN>(first ? nullptr : &start);
        }
        for (; i + 2 <= row_tiles; i += 2) {
            const bool more = i + 4 <= row_tiles;
            const Sums to = result<kN>(i, 2), from = waiting<kN>(i + 2), next = more ? result<kN>(i + 2, 2) : to;
            multiply_tiles<2, kN, kTiles, kFormat>(a + i * row_step, row_step, steps, ring, i + 2 >= row_tiles,
                                                   {next.at, next.stride, more ? fetch_rows : 0});
            swap_sums<2, kN>(to, more && !first ? &from : nullptr);
            finish<kN>(i, 2, to);
        }
        if (i < row_tiles) {
            const Sums to = result<kN>(i, 1), from = waiting<kN>(i);
            load_sums<1, kN>(first ? nullptr : &from);
            multiply_tiles<1, kN, kTiles, kFormat>(a + i * row_step, row_step, steps, ring, true, {nullptr, 0, 0});
            swap_sums<1, kN>(to, nullptr);
            finish<kN>(i, 1, to);
        }
        ring.drop(steps);
    }
};

// kTiles: how many tiles are made in the shadow of a step.
template <int32_t kTiles, CodeFormat kFormat>
static void amx_block(const MatMulProblem& p, const MatMulPlan& plan, const uint8_t* scratch, uint8_t* own,
                      int64_t first, int64_t last, int64_t row_tile, int64_t row_tiles) {
    const PackedWeight& w = p.b;
    const int64_t all_tiles = amx_row_tiles(p.m), depth = panel_rows(p);
    uint8_t* sums = own + kRingSteps * kStepBytes;
    PanelWalk at = {&w, depth, first, last, first, 0};
    WeightRing ring(std::integral_constant<CodeFormat, kFormat>(), at, own);
    for (; !at.done(); at.advance()) {
        const BlockEpilogue epilogue = {p, (const float*)(scratch + plan.low_rank_at), at.strip, row_tile * 16,
                                        sums_are_results(p, at.strip, at.strips())};
        const PanelRows rows = {scratch + activation_tile(w, depth, all_tiles, at.k, row_tile),
                                row_tiles,
                                at.steps(),
                                at.k == 0,
                                sums + (at.strip - first) * row_tiles * kTileBytes,
                                at.k + depth >= w.padded_rows ? &epilogue : nullptr};
        if (at.strips() == 2)
            rows.multiply<2, kTiles, kFormat>(ring);
        else
            rows.multiply<1, kTiles, kFormat>(ring);
    }
}

static inline void run_bf16(const MatMulProblem& p, const MatMulPlan& plan, const uint8_t* scratch, int64_t first,
                            int64_t last) {
    configure_tiles();
    uint8_t* own = const_cast<uint8_t*>(scratch) + plan.units_at + first / plan.strips_per_run_unit * plan.unit_bytes;
    const int64_t row_tiles = amx_row_tiles(p.m);
    using Block = decltype(&amx_block<1, kPlain4Bit>);
    static constexpr Block kBlocks[2][3] = {
        {amx_block<1, kPlain4Bit>, amx_block<1, kOther4Bit>, amx_block<1, kOtherBits>},
        {amx_block<2, kPlain4Bit>, amx_block<2, kOther4Bit>, amx_block<2, kOtherBits>}};
    const CodeFormat format = code_format(p.b.scheme);
    for (int64_t strip = first; strip < last; strip += kBlockStrips) {
        const int64_t end = strip + kBlockStrips < last ? strip + kBlockStrips : last;
        for (int64_t row = 0; row < row_tiles; row += kBlockRowTiles) {
            const int64_t count = row_tiles - row < kBlockRowTiles ? row_tiles - row : kBlockRowTiles;
            const auto block = kBlocks[count <= 2][format];
            block(p, plan, scratch, own, strip, end, row, count);
        }
    }
    _tile_release();
}

}  // namespace OSL_ISA
}  // namespace osl
