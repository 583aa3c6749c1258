// y = epilogue(a * dequantized(b)): the products of block-quantized weights. No runtime's types, no allocation, no
// threads of its own: the caller owns the pool and the scratch memory, and calls
//
//   MatMulPlan plan;
//   if (const char* error = plan_matmul(problem, threads, kAutoIsa, &plan)) ...   // cheap: no memory is touched
//   scratch: plan.scratch_bytes, any alignment
//   prepare_matmul(problem, plan, scratch, begin, end)   over [0, plan.prepare_units), in any order, any thread
//   -- everything above must be finished --
//   run_matmul(problem, plan, scratch, begin, end)       over [0, plan.run_units), in any order, any thread
//
// Units of a stage are independent and write disjoint memory. plan.prepare_units is 1 where sharing the work out would
// cost more than it gains (always at m = 1): call it inline. Nothing throws; concurrent calls with different scratch
// are safe. The floating-point environment of the calling thread is set to the default for the call and restored.
//
// custom_ops/matmul_reference.py (numpy) is the specification.
#pragma once

#include "packing/sparse_weight.h"

namespace osl {

enum ElementType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// The least precision that a result may have; kernels may be better than asked.
enum Accuracy : int32_t {
    kExact = 0,  // products and sums in float32
    kBf16 = 1,   // activations and dequantized weights rounded to bfloat16, sums in float32
    kInt8 = 2,   // activations rounded to int8 with a scale per min(block, 32) rows of K, exact sums in a block
};

// Of the columns of the product. The gated ones need a weight with kPairedHalves and give N / 2 columns:
// y[:, j] = f(x[:, j]) * x[:, N / 2 + j].
enum Activation : int32_t {
    kNoActivation = 0,
    kSilu = 1,
    kGelu = 2,      // with erf
    kGeluTanh = 3,  // the tanh approximation
    kSiluGate = 4,
    kGeluGate = 5,
    kGeluTanhGate = 6,
};

// The instruction sets that products have kernels for, in the order of preference. Names for ONNXSLIM_LLM_ISA:
// scalar, avx2, avxvnni, avx512vnni, amx, neon_dotprod, neon_i8mm.
enum KernelIsa : int32_t {
    kAutoIsa = 0,
    kIsaScalar = 1,
    kIsaAvx2 = 2,
    kIsaAvxVnni = 3,
    kIsaAvx512Vnni = 4,
    kIsaAmx = 5,
    kIsaNeonDotprod = 6,
    kIsaNeonI8mm = 7,
};
constexpr int32_t kKernelIsas = 8;

// Optional parts are null. Rows of every matrix are contiguous; strides are in elements. Leading dimensions of a
// batch are folded into m.
struct MatMulProblem {
    PackedWeight b;              // [K, N]
    const SparseWeight* sparse;  // null, or b in its sparse form: b needs no strips then
    const void* a;               // [m, K] of type `type`
    void* y;                     // [m, N], or [m, N / 2] with a gate, of type `type`
    int64_t m;
    int64_t a_stride;  // elements from a[i, 0] to a[i + 1, 0]
    int64_t y_stride;
    ElementType type;  // of a, y, bias, residual
    Accuracy accuracy;
    Activation activation;
    // y = activate(a * b + (a * u) * v + bias) + residual
    const float* low_rank_u;  // [K, rank]
    const float* low_rank_v;  // [rank, N]
    int64_t rank;
    const void* bias;      // [N]
    const void* residual;  // the shape of y
    int64_t residual_stride;
};

struct MatMulPlan {
    int64_t scratch_bytes;
    int64_t prepare_units;
    int64_t run_units;
    // The rest is the kernels' own.
    KernelIsa isa;
    int32_t method;
    int64_t rows_per_prepare_unit;
    int64_t strips_per_run_unit;
    int64_t unit_bytes;  // scratch of each run unit
    int64_t units_at;    // where that begins
    int64_t low_rank_at;
    int64_t expanded_strips;  // at a time, of a sparse weight; 0 where its codes go from the bitmap into the product
    int64_t expanded_bytes;   // scratch of each run unit
    int64_t expanded_at;
};

// Columns of y.
static inline int64_t output_columns(const PackedWeight& b, Activation activation) {
    return activation >= kSiluGate ? b.columns / 2 : b.columns;
}

// `threads` is how many threads the caller will use. Null when the plan is filled in, otherwise what is wrong.
const char* plan_matmul(const MatMulProblem& problem, int64_t threads, KernelIsa isa, MatMulPlan* plan);
void prepare_matmul(const MatMulProblem& problem, const MatMulPlan& plan, void* scratch, int64_t begin, int64_t end);
void run_matmul(const MatMulProblem& problem, const MatMulPlan& plan, void* scratch, int64_t begin, int64_t end);

// The strips [first, last) of a sparse weight as they are in a packed one: the same bytes on every instruction set.
void expand_strips(const SparseWeight& weight, KernelIsa isa, int64_t first, int64_t last, uint8_t* strips);
// Rows up to which a product takes less time with the sparse weight than with the packed one (measured, see
// docs/kernels.md); 0 where it never does.
int64_t rows_faster_sparse(const SparseWeight& weight);
// The whole of it, header included: expanded_bytes() of them.
void expand_weight(const SparseWeight& weight, KernelIsa isa, uint8_t* packed);

bool supports(KernelIsa isa);

// What kAutoIsa means: the best supported one, or the one that ONNXSLIM_LLM_ISA names. Decided once per process.
KernelIsa best_kernel_isa();

}  // namespace osl
