// EmptyNode: does nothing, to measure what a node costs beside its work. Y is left as the runtime allocates it.
//
//   Y = EmptyNode <parallel = 0 | 1> (X), of X's shape; with `parallel`, the session's threads are woken up, too.
#include <new>

#include "glue/inference.h"
#include "glue/operator.h"

namespace osl::ort {
namespace {

constexpr Input kInputs[] = {{kSameAsOutput, kRequired}};

struct Kernel {
    const OrtApi* api;
    bool shape_in_place;
    int64_t parallel;
};

void nothing(void*, size_t) {}

OrtStatus* create(const Operator& op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    const Node node(api, info, kEmptyNode.name);
    int64_t parallel = 0;
    OSL_RETURN_IF_FAILED(node.integer("parallel", 0, 1, &parallel));
    *kernel = new (std::nothrow) Kernel{api, op.runtime.shape_in_place, parallel};
    return *kernel != nullptr ? nullptr : node.fail(kFail, "out of memory");
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

OrtStatus* compute(void* state, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<const Kernel*>(state);
    constexpr size_t kUnits = 64;
    Tensor x;
    void* y = nullptr;
    OSL_RETURN_IF_FAILED(read_input(kernel.api, kernel.shape_in_place, context, 0, &x));
    OSL_RETURN_IF_FAILED(make_output(kernel.api, context, x.shape, &y));
    if (kernel.parallel) return ParallelFor::call(kernel.api, context, nothing, kUnits, 0, nullptr);
    return nullptr;
}

OrtStatus* infer_shapes(const OrtApi* api, OrtShapeInferContext* context) {
    SymbolicShape x;
    OSL_RETURN_IF_FAILED(infer_input(api, context, 0, &x));
    return x.known ? infer_output(api, context, x.type, x) : nullptr;
}

}  // namespace

const Definition kEmptyNode = {"EmptyNode", kInputs, 1, kFloatOnly, create, compute, destroy, infer_shapes};

}  // namespace osl::ort
