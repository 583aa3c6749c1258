// The kernels of one instruction set: walks strips and groups of rows. Compiled several times, with OSL_ISA naming the
// variant.
#include "kernels/kernel_set.h"

#include "kernels/epilogue.h"
#include "kernels/expand_strips.h"
#include "kernels/float_tile.h"
#include "kernels/prepare.h"
#if defined(OSL_TILE_HEADER)
#include OSL_TILE_HEADER
#else
#include "kernels/int8_tile_scalar.h"
#endif
#if defined(__AVX512VBMI2__)
#include "kernels/sparse_tile_avx512.h"
#endif
#if defined(__AMX_BF16__)
#include "kernels/amx_bf16.h"
#endif

namespace osl {
namespace OSL_ISA {
namespace {

void prepare(const MatMulProblem& p, const MatMulPlan& plan, uint8_t* scratch, int64_t first, int64_t last) {
    if (p.rank > 0) prepare_low_rank(p, (float*)(scratch + plan.low_rank_at), first, last);
    if (plan.method == kMethodFloat) return prepare_float(p, scratch, first, last);
#if defined(__AMX_BF16__)
    if (plan.method == kMethodAmxBf16) return prepare_bf16(p, scratch, first, last);
#endif
    return prepare_int8(p, scratch, first, last);
}

void run_packed(const MatMulProblem& p, const MatMulPlan& plan, uint8_t* scratch, int64_t first, int64_t last) {
#if defined(__AMX_BF16__)
    if (plan.method == kMethodAmxBf16) return run_bf16(p, plan, scratch, first, last);
#endif
    const PackedWeight& w = p.b;
    const bool gate = p.activation >= kSiluGate, paired = plan.method == kMethodInt8 && p.m <= kPairedRows;
    const float* low_rank = (const float*)(scratch + plan.low_rank_at);
    const Int8Scratch codes = int8_scratch(w, p.m, scratch);
    for (int64_t strip = first; strip < last;) {
        const int32_t strips = gate || (paired && strip + 1 < last) ? 2 : 1;
        const int32_t at_once = paired ? strips : 1;
        for (int64_t row = 0; row < p.m; row += kGroupRows) {
            alignas(64) float sums[2][kGroupRows * kStripColumns];
            const int32_t rows = group_rows(p.m, row);
            for (int32_t i = 0; i < strips; i += at_once) {
                const uint8_t* bytes = w.strips + (strip + i) * w.strip_bytes;
                if (plan.method == kMethodFloat)
                    float_tile(w, bytes, (const float*)scratch + row * w.padded_rows, rows, sums[i]);
                else
                    int8_tile(w, bytes, int8_group(w, codes, p.m, row), at_once, sums[i]);
            }
            for (int32_t i = 0; i < (gate ? 1 : strips); i++)
                finish_rows(p, low_rank, row, rows, strip + i, sums[i], kStripColumns, kGroupRows * kStripColumns);
        }
        strip += strips;
    }
}

#if defined(__AVX512VBMI2__)

void run_sparse(const MatMulProblem& p, const MatMulPlan& plan, uint8_t* scratch, int64_t first, int64_t last) {
    const int32_t strips = p.activation >= kSiluGate ? 2 : 1;
    const float* low_rank = (const float*)(scratch + plan.low_rank_at);
    const Int8Rows rows = int8_group(p.b, int8_scratch(p.b, p.m, scratch), p.m, 0);
    for (int64_t strip = first; strip < last; strip += strips) {
        alignas(64) float sums[2][kSparseRows * kStripColumns];
        for (int32_t i = 0; i < strips; i++) sparse_tile(*p.sparse, strip + i, rows, sums[i]);
        finish_rows(p, low_rank, 0, rows.rows, strip, sums[0], kStripColumns, kSparseRows * kStripColumns);
    }
}

#else

constexpr int64_t kSparseRows = 0;

#endif

void run(const MatMulProblem& p, const MatMulPlan& plan, uint8_t* scratch, int64_t first, int64_t last) {
    if (p.sparse == nullptr) return run_packed(p, plan, scratch, first, last);
#if defined(__AVX512VBMI2__)
    if (plan.expanded_strips == 0) return run_sparse(p, plan, scratch, first, last);
#endif
    uint8_t* expanded = scratch + plan.expanded_at + first / plan.strips_per_run_unit * plan.expanded_bytes;
    MatMulProblem part = p;
    part.sparse = nullptr;
    for (int64_t strip = first; strip < last; strip += plan.expanded_strips) {
        const int64_t end = last - strip < plan.expanded_strips ? last : strip + plan.expanded_strips;
        expand_strips_any(*p.sparse, strip, end, expanded);
        // Where strip 0 would be: only those that were expanded are read.
        part.b.strips = (const uint8_t*)((uintptr_t)expanded - (uintptr_t)(strip * p.b.strip_bytes));
        run_packed(part, plan, scratch, strip, end);
    }
}

}  // namespace

extern const KernelSet kKernels;
const KernelSet kKernels = {prepare, run, expand_strips_any, kSparseRows};

}  // namespace OSL_ISA
}  // namespace osl
