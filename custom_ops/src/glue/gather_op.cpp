// GatherPacked: Y = columns of a packed weight, that is rows of the table [N, K], at `indices`.
//
//   inputs      B uint8 [bytes] (initializer, plain column order), indices int64 [...]
//   output      Y [..., K] float. Negative indices count from the end.
//   attributes  K, N, bits, block_size, as of MatMulPacked
#include <new>

#include "glue/inference.h"
#include "glue/operator.h"
#include "glue/packed_input.h"
#include "kernels/gather_packed.h"

namespace osl::ort {
namespace {

enum InputIndex : size_t { kB, kIndices, kInputCount };

constexpr Input kInputs[kInputCount] = {{kUint8, kRequired}, {kInt64, kRequired}};

// Elements below which waking threads up costs more than they save.
constexpr int64_t kParallelElements = 1 << 15;

struct Kernel {
    Kernel(const OrtApi* api, const OrtKernelInfo* info) : node(api, info, kGatherPacked.name) {}

    Node node;
    bool shape_in_place = false;
    PackedWeight weight = {};

    OrtStatus* open(const Operator& op);
    OrtStatus* compute(OrtKernelContext* context) const;
};

OrtStatus* Kernel::open(const Operator& op) {
    shape_in_place = op.runtime.shape_in_place;
    OSL_RETURN_IF_FAILED(read_packed(node, kB, shape_in_place, &weight));
    if (weight.order != kPlainColumns) return node.fail(kInvalidGraph, "the table is packed for a gate");
    return nullptr;
}

// What the threads of one call share.
struct Work {
    const PackedWeight& weight;
    const int64_t* indices;
    float* rows;
};

void look_up(void* data, size_t i) {
    const Work& work = *static_cast<const Work*>(data);
    const int64_t index = work.indices[i], n = index < 0 ? index + work.weight.columns : index;
    read_column(work.weight, n, work.rows + (int64_t)i * work.weight.rows);
}

OrtStatus* Kernel::compute(OrtKernelContext* context) const {
    const OrtApi* api = node.api();
    Tensor indices;
    OSL_RETURN_IF_FAILED(read_input(api, shape_in_place, context, kIndices, &indices));
    Shape output = indices.shape;
    if (output.rank == kMaxRank) return node.fail(kInvalidArgument, "the indices have too many dimensions");
    output.dims[output.rank++] = weight.rows;
    const int64_t count = indices.shape.product(indices.shape.rank);
    if (count < 0 || output.product(output.rank) < 0) return node.fail(kInvalidArgument, "the output is too large");
    Work work = {weight, static_cast<const int64_t*>(indices.data), nullptr};
    for (int64_t i = 0; i < count; i++) {
        const int64_t index = work.indices[i];
        if (index < -weight.columns || index >= weight.columns) {
            return node.fail(kInvalidArgument, "index %lld is outside of the %lld rows of the table", (long long)index,
                             (long long)weight.columns);
        }
    }
    void* rows = nullptr;
    OSL_RETURN_IF_FAILED(make_output(api, context, output, &rows));
    work.rows = static_cast<float*>(rows);
    if (count > 1 && count * weight.rows >= kParallelElements) {
        return ParallelFor::call(api, context, look_up, (size_t)count, 0, &work);
    }
    for (int64_t i = 0; i < count; i++) look_up(&work, (size_t)i);
    return nullptr;
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

OrtStatus* create(const Operator& op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    Kernel* made = new (std::nothrow) Kernel(api, info);
    if (made == nullptr) return fail(api, kFail, "%s: out of memory", kGatherPacked.name);
    OrtStatus* status = made->open(op);
    if (status != nullptr) {
        destroy(made);
        return status;
    }
    *kernel = made;
    return nullptr;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    return static_cast<const Kernel*>(kernel)->compute(context);
}

OrtStatus* infer_shapes(const OrtApi* api, OrtShapeInferContext* context) {
    SymbolicShape rows;
    OSL_RETURN_IF_FAILED(infer_input(api, context, kIndices, &rows));
    const int64_t k = infer_integer(api, context, "K", 0);
    if (!rows.known || rows.shape.rank == kMaxRank || k <= 0) return nullptr;
    rows.names[rows.shape.rank] = "";
    rows.shape.dims[rows.shape.rank++] = k;
    return infer_output(api, context, kFloat, rows);
}

}  // namespace

const Definition kGatherPacked = {"GatherPacked", kInputs, kInputCount, kFloatOnly,
                                  create,         compute, destroy,     infer_shapes};

}  // namespace osl::ort
