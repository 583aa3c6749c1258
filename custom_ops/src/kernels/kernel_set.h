// What one instruction set brings to the products, and how the scratch memory of a call is laid out.
//
// Activations are stored in groups of up to 16 rows, inside a group by k: what a kernel needs of all rows for one
// block is contiguous, whatever K is (rows of a power-of-two length would fight for the same cache sets).
#pragma once

#include "kernels/matmul.h"

namespace osl {

constexpr int32_t kGroupRows = 16;
constexpr int32_t kDotRows = 32;  // rows of K that are decoded at a time, and the longest block of int8 activations

enum Method : int32_t { kMethodFloat = 0, kMethodInt8 = 1, kMethodAmxBf16 = 2 };

// Blocking of the AMX kernels; see amx_bf16.h. Measured on Sapphire Rapids (48 KiB and 2 MiB of cache).
#ifndef OSL_PANEL_STEPS
#define OSL_PANEL_STEPS 13
#define OSL_RING_STEPS 20
#define OSL_BLOCK_STRIPS 32
#define OSL_BLOCK_ROW_TILES 16
#endif
constexpr int32_t kRingSteps = OSL_RING_STEPS;        // of dequantized weights: 32 rows of K by two strips, 2 KiB
constexpr int64_t kPanelRows = OSL_PANEL_STEPS * 32;  // of K between two visits to the sums
constexpr int64_t kBlockStrips = OSL_BLOCK_STRIPS;
constexpr int64_t kBlockRowTiles = OSL_BLOCK_ROW_TILES;

// Tiles of 16 rows. A second one of nothing is cheap: what decides there is how fast weights are dequantized, and that
// hides better behind more tile products.
static inline int64_t amx_row_tiles(int64_t m) { return m <= 16 ? 2 : (m + 15) / 16; }

// Scratch of one run unit: the ring, and the sums of a block.
static inline int64_t amx_unit_bytes(int64_t m, int64_t strips) {
    const int64_t row_tiles = amx_row_tiles(m), rows = row_tiles < kBlockRowTiles ? row_tiles : kBlockRowTiles;
    const int64_t columns = strips < kBlockStrips ? (strips + 1) / 2 * 2 : kBlockStrips;
    return kRingSteps * 2048 + rows * columns * 1024;
}

// Rows of K that share a scale in the int8 mode.
static inline int32_t activation_block(const PackedWeight& w) { return w.scheme.block < kDotRows ? 16 : kDotRows; }

// Rows of the group of rows that begins at row `first`.
static inline int32_t group_rows(int64_t m, int64_t first) {
    return (int32_t)(m - first < kGroupRows ? m - first : kGroupRows);
}

static inline int64_t align_64(int64_t bytes) { return packed_round_up(bytes, 64); }

// Of the whole call: codes [groups][K / 32][rows][32], then scales and offsets, each [groups][K / block][rows].
struct Int8Scratch {
    int8_t* codes;
    float* scales;
    int32_t* offsets;  // minus the sum of the block's codes, times the zero point where that is the same everywhere
};

static inline Int8Scratch int8_scratch(const PackedWeight& w, int64_t m, void* scratch) {
    const int64_t count = m * (w.padded_rows / activation_block(w));
    uint8_t* base = (uint8_t*)scratch;
    return {(int8_t*)base, (float*)(base + align_64(m * w.padded_rows)),
            (int32_t*)(base + align_64(m * w.padded_rows) + align_64(count * 4))};
}

static inline int64_t int8_scratch_bytes(const PackedWeight& w, int64_t m) {
    return align_64(m * w.padded_rows) + 2 * align_64(m * (w.padded_rows / activation_block(w)) * 4);
}

// One group of it.
struct Int8Rows {
    const int8_t* codes;     // [K / 32][rows][32]
    const float* scales;     // [K / block][rows]
    const int32_t* offsets;  // [K / block][rows]
    int32_t rows;
};

static inline Int8Rows int8_group(const PackedWeight& w, const Int8Scratch& s, int64_t m, int64_t first) {
    const int64_t blocks = w.padded_rows / activation_block(w);
    return {s.codes + first * w.padded_rows, s.scales + first * blocks, s.offsets + first * blocks,
            group_rows(m, first)};
}

struct KernelSet {
    // Rows [first, last) of a, in whole groups.
    void (*prepare)(const MatMulProblem& problem, const MatMulPlan& plan, uint8_t* scratch, int64_t first,
                    int64_t last);
    // Strips [first, last); even numbers of them where there is a gate.
    void (*run)(const MatMulProblem& problem, const MatMulPlan& plan, uint8_t* scratch, int64_t first, int64_t last);
    // Strips [first, last) of a sparse weight.
    void (*expand)(const SparseWeight& weight, int64_t first, int64_t last, uint8_t* strips);
    // Up to so many, the int8 mode reads sparse weights of 4 bits as they are.
    int64_t sparse_rows;
};

#define OSL_DECLARE_KERNELS(isa)     \
    namespace isa {                  \
    extern const KernelSet kKernels; \
    }
OSL_DECLARE_KERNELS(matmul_scalar)
OSL_DECLARE_KERNELS(matmul_avx2)
OSL_DECLARE_KERNELS(matmul_avxvnni)
OSL_DECLARE_KERNELS(matmul_avx512vnni)
OSL_DECLARE_KERNELS(matmul_amx)
OSL_DECLARE_KERNELS(matmul_neon_dotprod)
OSL_DECLARE_KERNELS(matmul_neon_i8mm)
#undef OSL_DECLARE_KERNELS

}  // namespace osl
