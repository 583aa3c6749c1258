// The C interface over packing and kernels.
#include "kernels/matmul.h"

#include <cstdlib>
#include <memory>

#include "interface/onnxslim_matmul.h"

namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};

osl::PackedScheme scheme_of(const OslPackedScheme& s) {
    return {s.bits, s.block, (osl::ScaleType)s.scale_type, s.zero_points != 0};
}

bool known_enums(const OslPackedScheme& s) {
    return s.scale_type >= 0 && s.scale_type <= osl::kScaleBfloat16 && s.column_order >= 0 &&
           s.column_order <= osl::kPairedHalves;
}

osl::MatMulProblem problem_of(const OslMatMulArgs& args, const osl::PackedWeight& weight) {
    osl::MatMulProblem p = {};
    p.b = weight;
    p.a = args.a;
    p.y = args.y;
    p.m = args.m;
    p.a_stride = args.a_stride;
    p.y_stride = args.y_stride;
    p.type = (osl::ElementType)args.type;
    p.accuracy = (osl::Accuracy)args.accuracy;
    p.activation = (osl::Activation)args.activation;
    p.low_rank_u = args.low_rank_u;
    p.low_rank_v = args.low_rank_v;
    p.rank = args.rank;
    p.bias = args.bias;
    p.residual = args.residual;
    p.residual_stride = args.residual_stride;
    return p;
}

}  // namespace

int32_t osl_supports_kernel_isa(int32_t isa) { return osl::supports((osl::KernelIsa)isa); }

int32_t osl_best_kernel_isa(void) { return osl::best_kernel_isa(); }

int64_t osl_packed_bytes(const OslPackedScheme* s) {
    if (s == nullptr || !known_enums(*s)) return -1;
    return osl::packed_weight_bytes(scheme_of(*s), s->rows, s->columns, (osl::ColumnOrder)s->column_order);
}

const char* osl_pack_weight(const OslPackedScheme* s, const uint8_t* codes, const void* scales,
                            const uint8_t* zero_points, int64_t first, int64_t last, uint8_t* packed) {
    if (osl_packed_bytes(s) < 0) return "a weight of this scheme and shape cannot be packed";
    const auto order = (osl::ColumnOrder)s->column_order;
    const bool arrays = codes != nullptr && scales != nullptr && (zero_points != nullptr) == (s->zero_points != 0);
    if (!arrays || packed == nullptr) return "an array is missing";
    if (first < 0 || last < first || last > osl::strip_count(s->columns, order)) return "there are no such strips";
    osl::pack_weight(
        {const_cast<uint8_t*>(codes), (uint8_t*)const_cast<void*>(scales), const_cast<uint8_t*>(zero_points)},
        scheme_of(*s), s->rows, s->columns, order, first, last, packed);
    return nullptr;
}

const char* osl_parse_packed(const void* packed, int64_t bytes, OslPackedScheme* s) {
    osl::PackedWeight w;
    if (bytes < 0) return "the number of bytes is negative";
    if (const char* error = osl::parse_packed_weight(packed, (size_t)bytes, &w)) return error;
    *s = {w.rows, w.columns, w.scheme.bits, w.scheme.block, w.scheme.scale_type, w.scheme.zero_points, w.order};
    return nullptr;
}

const char* osl_unpack_weight(const void* packed, int64_t bytes, uint8_t* codes, void* scales, uint8_t* zero_points) {
    osl::PackedWeight w;
    if (bytes < 0) return "the number of bytes is negative";
    if (const char* error = osl::parse_packed_weight(packed, (size_t)bytes, &w)) return error;
    if (codes == nullptr || scales == nullptr || (w.scheme.zero_points && zero_points == nullptr))
        return "an array is missing";
    osl::unpack_weight(w, 0, w.strips_count, {codes, (uint8_t*)scales, zero_points});
    return nullptr;
}

int64_t osl_sparse_bytes(const void* packed, int64_t bytes) {
    osl::PackedWeight w;
    if (bytes < 0 || osl::parse_packed_weight(packed, (size_t)bytes, &w) != nullptr) return -1;
    return osl::sparse_weight_bytes(w);
}

const char* osl_make_sparse(const void* packed, int64_t bytes, int64_t sparse_bytes, uint8_t* sparse) {
    osl::PackedWeight w;
    if (bytes < 0) return "the number of bytes is negative";
    if (const char* error = osl::parse_packed_weight(packed, (size_t)bytes, &w)) return error;
    if (osl::sparse_weight_bytes(w) < 0) return "codes of 2 and 3 bits have no sparse form";
    if (sparse == nullptr || sparse_bytes != osl::sparse_weight_bytes(w)) return "the result has another size";
    osl::make_sparse(w, sparse_bytes, sparse);
    return nullptr;
}

int64_t osl_expanded_bytes(const void* sparse, int64_t bytes) {
    osl::SparseWeight s;
    if (bytes < 0 || osl::parse_sparse_weight(sparse, (size_t)bytes, &s) != nullptr) return -1;
    return osl::expanded_bytes(s);
}

int64_t osl_sparse_values(const void* sparse, int64_t bytes) {
    osl::SparseWeight s;
    if (bytes < 0 || osl::parse_sparse_weight(sparse, (size_t)bytes, &s) != nullptr) return -1;
    return s.values;
}

const char* osl_expand_weight(const void* sparse, int64_t bytes, int32_t isa, uint8_t* packed) {
    osl::SparseWeight s;
    if (bytes < 0) return "the number of bytes is negative";
    if (const char* error = osl::parse_sparse_weight(sparse, (size_t)bytes, &s)) return error;
    if (packed == nullptr) return "an array is missing";
    if (!osl::supports((osl::KernelIsa)isa)) return "this machine lacks the instruction set";
    osl::expand_weight(s, (osl::KernelIsa)isa, packed);
    return nullptr;
}

const char* osl_matmul(const OslMatMulArgs* args, int64_t threads) {
    if (args == nullptr || args->packed_bytes < 0) return "the arguments are missing";
    osl::PackedWeight weight;
    osl::SparseWeight sparse;
    const size_t bytes = (size_t)args->packed_bytes;
    const bool is_sparse = osl::has_sparse_magic(args->packed, bytes);
    const char* wrong = is_sparse ? osl::parse_sparse_weight(args->packed, bytes, &sparse)
                                  : osl::parse_packed_weight(args->packed, bytes, &weight);
    if (wrong != nullptr) return wrong;
    osl::MatMulProblem problem = problem_of(*args, is_sparse ? sparse.packed : weight);
    if (is_sparse) problem.sparse = &sparse;
    osl::MatMulPlan plan;
    if (const char* error = osl::plan_matmul(problem, threads, (osl::KernelIsa)args->isa, &plan)) return error;
    const std::unique_ptr<void, Free> scratch(std::malloc((size_t)plan.scratch_bytes + 1));
    if (scratch == nullptr) return "out of memory";
    // Backwards and one by one: units must not depend on their order.
    for (int64_t unit = plan.prepare_units; unit > 0; unit--)
        osl::prepare_matmul(problem, plan, scratch.get(), unit - 1, unit);
    for (int64_t unit = plan.run_units; unit > 0; unit--) osl::run_matmul(problem, plan, scratch.get(), unit - 1, unit);
    return nullptr;
}
