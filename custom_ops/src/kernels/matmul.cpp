// Argument checks, the choice of a method, how the work is cut, and the way to the kernels of an instruction set.
#include "kernels/matmul.h"

#include "kernels/kernel_set.h"
#include "platform/float_environment.h"

namespace osl {
namespace {

const KernelSet& kernels_of(KernelIsa isa) {
    switch (isa) {
#ifdef OSL_X86_KERNELS
        case kIsaAvx2:
            return matmul_avx2::kKernels;
        case kIsaAvxVnni:
            return matmul_avxvnni::kKernels;
        case kIsaAvx512Vnni:
            return matmul_avx512vnni::kKernels;
        case kIsaAmx:
            return matmul_amx::kKernels;
#endif
#ifdef OSL_NEON_KERNELS
        case kIsaNeonDotprod:
            return matmul_neon_dotprod::kKernels;
        case kIsaNeonI8mm:
            return matmul_neon_i8mm::kKernels;
#endif
        default:
            return matmul_scalar::kKernels;
    }
}

bool within(int32_t value, int32_t last) { return value >= 0 && value <= last; }

const char* check(const MatMulProblem& p, int64_t threads) {
    if ((p.b.strips == nullptr && p.sparse == nullptr) || p.b.rows < 1 || p.b.columns < 1)
        return "the packed weight was not parsed";
    if (p.m < 0 || threads < 1) return "the number of rows or threads is out of range";
    if (p.m > 0 && (p.a == nullptr || p.y == nullptr)) return "a matrix is missing";
    if (!within(p.type, kBfloat16) || !within(p.accuracy, kInt8) || !within(p.activation, kGeluTanhGate))
        return "an enumeration is out of range";
    if (p.activation >= kSiluGate && p.b.order != kPairedHalves)
        return "a gated activation needs a weight whose columns are packed in paired halves";
    if (p.a_stride < p.b.rows || p.y_stride < output_columns(p.b, p.activation))
        return "a stride is shorter than a row";
    if (p.residual != nullptr && p.residual_stride < output_columns(p.b, p.activation))
        return "the stride of the residual is shorter than a row";
    if (p.rank < 0 || (p.rank > 0 && (p.low_rank_u == nullptr || p.low_rank_v == nullptr)))
        return "the low-rank correction is incomplete";
    // Every product of sizes below stays within 63 bits.
    constexpr int64_t kMost = int64_t{1} << 40;
    if (p.m > kMost / p.b.padded_rows || p.m > kMost / p.b.columns || p.rank > kMost / (p.m + 1))
        return "the product is too large";
    return nullptr;
}

int64_t activation_bytes(const MatMulProblem& p, int32_t method) {
    if (method == kMethodInt8) return int8_scratch_bytes(p.b, p.m);
    if (method == kMethodAmxBf16) return amx_row_tiles(p.m) * 16 * p.b.padded_rows * 2;
    return align_64(p.m * p.b.padded_rows * (int64_t)sizeof(float));
}

uint8_t* aligned(void* scratch) { return (uint8_t*)(((uintptr_t)scratch + 63) & ~(uintptr_t)63); }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Units per thread, so that a thread that was held up leaves its share to others.
constexpr int64_t kUnitsPerThread = 4;

// Rows from which on dequantizing to bfloat16 for AMX beats exact sums with VNNI (measured).
constexpr int64_t kAmxRows = 11;

// Density up to which few rows are faster with sparse codes: there is less to read, but more to do (measured).
constexpr double kSparseDensity = 0.4;

int32_t method_of(const MatMulProblem& p, KernelIsa isa) {
    if (p.accuracy != kExact && isa == kIsaAmx && p.m >= kAmxRows) return kMethodAmxBf16;
    return p.accuracy == kInt8 ? kMethodInt8 : kMethodFloat;
}

}  // namespace

void expand_strips(const SparseWeight& weight, KernelIsa isa, int64_t first, int64_t last, uint8_t* strips) {
    kernels_of(isa == kAutoIsa ? best_kernel_isa() : isa).expand(weight, first, last, strips);
}

int64_t rows_faster_sparse(const SparseWeight& weight) {
    const PackedWeight& w = weight.packed;
    const double density = (double)weight.values / ((double)w.padded_rows * (double)w.strips_count * kStripColumns);
    return w.scheme.bits == 4 && density <= kSparseDensity ? kernels_of(best_kernel_isa()).sparse_rows : 0;
}

void expand_weight(const SparseWeight& weight, KernelIsa isa, uint8_t* packed) {
    const PackedHeader header = packed_header(weight.packed);
    memcpy(packed, &header, sizeof header);
    expand_strips(weight, isa, 0, weight.packed.strips_count, packed + sizeof header);
}

const char* plan_matmul(const MatMulProblem& p, int64_t threads, KernelIsa isa, MatMulPlan* plan) {
    const KernelIsa chosen = isa == kAutoIsa ? best_kernel_isa() : isa;
    if (!supports(chosen)) return "this machine lacks the instruction set";
    if (const char* error = check(p, threads)) return error;
    *plan = {};
    plan->isa = chosen;
    plan->method = method_of(p, chosen);
    if (p.m == 0) return nullptr;

    const bool amx = plan->method == kMethodAmxBf16;
    const int64_t step = amx || p.activation >= kSiluGate ? 2 : 1, pairs = quotient_up(p.b.strips_count, step);
    // The scratch of an AMX unit should stay in one core's cache: as many units as threads.
    plan->run_units = threads == 1 ? 1 : smaller(threads * (amx ? 1 : kUnitsPerThread), pairs);
    plan->strips_per_run_unit = quotient_up(pairs, plan->run_units) * step;
    plan->run_units = quotient_up(p.b.strips_count, plan->strips_per_run_unit);

    const int64_t groups = quotient_up(p.m, kGroupRows);
    plan->prepare_units = threads == 1 ? 1 : smaller(threads, groups);
    plan->rows_per_prepare_unit = quotient_up(groups, plan->prepare_units) * kGroupRows;
    plan->prepare_units = quotient_up(p.m, plan->rows_per_prepare_unit);

    if (amx) plan->unit_bytes = amx_unit_bytes(p.m, plan->strips_per_run_unit);
    plan->low_rank_at = activation_bytes(p, plan->method);
    plan->units_at = plan->low_rank_at + align_64(p.m * p.rank * (int64_t)sizeof(float));
    plan->expanded_at = plan->units_at + plan->unit_bytes * plan->run_units;
    const bool read_sparse =
        plan->method == kMethodInt8 && p.b.scheme.bits == 4 && p.m <= kernels_of(chosen).sparse_rows;
    if (p.sparse != nullptr && !read_sparse) {
        // What is expanded stays in the cache of the core that multiplies with it: the second level's with AMX.
        plan->expanded_strips = smaller(amx ? kBlockStrips : 2, plan->strips_per_run_unit);
        plan->expanded_bytes = align_64(plan->expanded_strips * p.b.strip_bytes);
    }
    plan->scratch_bytes = plan->expanded_at + plan->expanded_bytes * plan->run_units + 63;
    return nullptr;
}

void prepare_matmul(const MatMulProblem& p, const MatMulPlan& plan, void* scratch, int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    kernels_of(plan.isa).prepare(p, plan, aligned(scratch), begin * plan.rows_per_prepare_unit,
                                 smaller(end * plan.rows_per_prepare_unit, p.m));
}

void run_matmul(const MatMulProblem& p, const MatMulPlan& plan, void* scratch, int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    for (int64_t unit = begin; unit < end; unit++)
        kernels_of(plan.isa).run(p, plan, aligned(scratch), unit * plan.strips_per_run_unit,
                                 smaller((unit + 1) * plan.strips_per_run_unit, p.b.strips_count));
}

}  // namespace osl
