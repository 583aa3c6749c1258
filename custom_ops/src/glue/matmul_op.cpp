// MatMulPacked: Y = activate(A * B + (A * U) * V + bias) + residual, with B packed as packing/packed_weight.h says.
//
//   inputs      A [..., K] T, B uint8 [bytes] (initializer), bias [N] T, residual T (of Y's shape),
//               U [K, rank] float, V [rank, N] float; all but A and B may be left out. T: float, float16, bfloat16
//   output      Y [..., N] T, or [..., N / 2] with a gate
//   attributes  K, N, bits, block_size: as in B's header, so that a model can be read without its weights;
//               accuracy "exact" | "bf16" | "int8" (default); activation "none" (default) | "silu" | "gelu" |
//               "gelu_tanh" | "silu_gate" | "gelu_gate" | "gelu_tanh_gate"; expand "auto" (default) | "load" | "run",
//               of a B in the sparse form (packing/sparse_weight.h): see custom_ops/ops.py
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>

#include "glue/inference.h"
#include "glue/operator.h"
#include "glue/packed_input.h"
#include "glue/scratch.h"
#include "glue/threads.h"
#include "kernels/matmul.h"

namespace osl::ort {
namespace {

enum InputIndex : size_t { kA, kB, kBias, kResidual, kU, kV, kInputCount };

constexpr Input kInputs[kInputCount] = {{kSameAsOutput, kRequired}, {kUint8, kRequired}, {kSameAsOutput, kOptional},
                                        {kSameAsOutput, kOptional}, {kFloat, kOptional}, {kFloat, kOptional}};

// In the order of osl::Accuracy and osl::Activation.
constexpr const char* kAccuracies[] = {"exact", "bf16", "int8"};
constexpr const char* kActivations[] = {"none",      "silu",      "gelu",          "gelu_tanh",
                                        "silu_gate", "gelu_gate", "gelu_tanh_gate"};
constexpr char kGateSuffix[] = "_gate";

// When the codes of a sparse weight get their places.
enum Expand : int32_t { kExpandAuto, kExpandLoad, kExpandRun };
constexpr const char* kExpands[] = {"auto", "load", "run"};

bool is_gate(const char* activation) {
    const size_t length = std::strlen(activation), suffix = sizeof(kGateSuffix) - 1;
    return length > suffix && std::strcmp(activation + length - suffix, kGateSuffix) == 0;
}

osl::ElementType element_type(int32_t type) {
    return type == kFloat16 ? osl::kFloat16 : type == kBfloat16 ? osl::kBfloat16 : osl::kFloat32;
}

struct FreeMemory {
    void operator()(void* memory) const { std::free(memory); }
};

struct Kernel {
    Kernel(const OrtApi* api, const OrtKernelInfo* info) : node(api, info, kMatMulPacked.name) {}

    Node node;
    bool shape_in_place = false;
    size_t input_count = 0;
    int64_t threads = 1;
    MatMulProblem problem = {};  // what does not change from call to call
    SparseWeight sparse = {};
    int64_t sparse_rows = 0;                        // up to which it is read although it was expanded
    std::unique_ptr<uint8_t, FreeMemory> expanded;  // of a sparse weight that is expanded when the session opens
    ScratchSource scratch;

    OrtStatus* open(const Operator& op);
    OrtStatus* open_sparse(Expand expand);
    OrtStatus* compute(OrtKernelContext* context) const;
    OrtStatus* set_parts(const OrtKernelContext* context, const Shape& output, MatMulProblem* call) const;
    OrtStatus* run(OrtKernelContext* context, const MatMulProblem& call) const;
};

OrtStatus* Kernel::open(const Operator& op) {
    const OrtApi* api = node.api();
    shape_in_place = op.runtime.shape_in_place;
    threads = usable_threads();
    OSL_RETURN_IF_FAILED(KernelInfoGetInputCount::call(api, node.info(), &input_count));
    int32_t accuracy = 0, activation = 0, expand = 0;
    OSL_RETURN_IF_FAILED(node.choice("accuracy", kAccuracies, std::size(kAccuracies), kInt8, &accuracy));
    OSL_RETURN_IF_FAILED(node.choice("activation", kActivations, std::size(kActivations), kNoActivation, &activation));
    OSL_RETURN_IF_FAILED(node.choice("expand", kExpands, std::size(kExpands), kExpandAuto, &expand));
    bool is_sparse = false;
    OSL_RETURN_IF_FAILED(read_packed_or_sparse(node, kB, shape_in_place, &problem.b, &sparse, &is_sparse));
    if (is_sparse) OSL_RETURN_IF_FAILED(open_sparse((Expand)expand));
    problem.type = element_type(op.element_type);
    problem.accuracy = (Accuracy)accuracy;
    problem.activation = (Activation)activation;
    const bool gated = is_gate(kActivations[activation]);
    if (gated != (problem.b.order == kPairedHalves)) {
        return node.fail(kInvalidGraph, gated ? "B is not packed for a gate" : "B is packed for a gate");
    }
    // What is wrong in any case is found now, not in the first run.
    int64_t k = 0;
    OSL_RETURN_IF_FAILED(node.last_dimension(kA, &k));
    if (k >= 0 && k != problem.b.rows) {
        return node.fail(kInvalidGraph, "the last dimension of A is %lld, not K = %lld", (long long)k,
                         (long long)problem.b.rows);
    }
    MatMulProblem trial = problem;
    MatMulPlan plan;
    const float nothing = 0;
    trial.a = trial.y = const_cast<float*>(&nothing);
    trial.m = 1;
    trial.a_stride = problem.b.rows;
    trial.y_stride = output_columns(problem.b, problem.activation);
    if (const char* error = plan_matmul(trial, threads, kAutoIsa, &plan)) return node.fail(kInvalidGraph, "%s", error);
    return scratch.open(op.runtime, api, node.info());
}

OrtStatus* Kernel::open_sparse(Expand expand) {
    if (expand == kExpandRun) {
        problem.sparse = &sparse;
        return nullptr;
    }
    if (expand == kExpandAuto) sparse_rows = rows_faster_sparse(sparse);
    const size_t bytes = (size_t)packed_round_up(expanded_bytes(sparse), kScratchAlignment);
    expanded.reset(static_cast<uint8_t*>(std::aligned_alloc(kScratchAlignment, bytes)));
    if (expanded == nullptr) return node.fail(kFail, "out of memory for the expanded weight of %zu bytes", bytes);
    expand_weight(sparse, kAutoIsa, expanded.get());
    const char* error = parse_packed_weight(expanded.get(), (size_t)expanded_bytes(sparse), &problem.b);
    return error == nullptr ? nullptr : node.fail(kFail, "%s", error);
}

OrtStatus* Kernel::set_parts(const OrtKernelContext* context, const Shape& output, MatMulProblem* call) const {
    Tensor parts[kInputCount];
    for (size_t i = kBias; i < input_count; i++) {
        OSL_RETURN_IF_FAILED(read_input(node.api(), shape_in_place, context, i, &parts[i]));
    }
    const Tensor &bias = parts[kBias], &residual = parts[kResidual], &u = parts[kU], &v = parts[kV];
    const int64_t k = problem.b.rows, n = problem.b.columns;
    if (bias.data != nullptr && !bias.shape.is(n)) {
        return node.fail(kInvalidArgument, "the bias is [%s], not [%lld]", ShapeText(bias.shape).text, (long long)n);
    }
    if (residual.data != nullptr && !(residual.shape == output)) {
        return node.fail(kInvalidArgument, "the residual is [%s], the output [%s]", ShapeText(residual.shape).text,
                         ShapeText(output).text);
    }
    if ((u.data != nullptr) != (v.data != nullptr)) return node.fail(kInvalidArgument, "U and V go together");
    if (u.data != nullptr) {
        call->rank = u.shape.rank == 2 ? u.shape[1] : 0;
        if (call->rank < 1 || !u.shape.is(k, call->rank) || !v.shape.is(call->rank, n)) {
            return node.fail(kInvalidArgument, "U is [%s] and V [%s], not [%lld x r] and [r x %lld]",
                             ShapeText(u.shape).text, ShapeText(v.shape).text, (long long)k, (long long)n);
        }
    }
    call->bias = bias.data;
    call->residual = residual.data;
    call->residual_stride = output.last();
    call->low_rank_u = static_cast<const float*>(u.data);
    call->low_rank_v = static_cast<const float*>(v.data);
    return nullptr;
}

OrtStatus* Kernel::compute(OrtKernelContext* context) const {
    const OrtApi* api = node.api();
    Tensor a;
    OSL_RETURN_IF_FAILED(read_input(api, shape_in_place, context, kA, &a));
    if (a.shape.rank == 0 || a.shape.last() != problem.b.rows) {
        return node.fail(kInvalidArgument, "A is [%s]; its last dimension must be K = %lld", ShapeText(a.shape).text,
                         (long long)problem.b.rows);
    }
    MatMulProblem call = problem;
    Shape output = a.shape;
    output.dims[output.rank - 1] = output_columns(problem.b, problem.activation);
    call.m = a.shape.product(a.shape.rank - 1);
    if (call.m < 0 || output.product(output.rank) < 0) return node.fail(kInvalidArgument, "the output is too large");
    if (input_count > kBias) OSL_RETURN_IF_FAILED(set_parts(context, output, &call));
    OSL_RETURN_IF_FAILED(make_output(api, context, output, &call.y));
    if (call.m == 0) return nullptr;
    if (call.m <= sparse_rows && call.accuracy == kInt8) call.sparse = &sparse;
    call.a = a.data;
    call.a_stride = problem.b.rows;
    call.y_stride = output.last();
    return run(context, call);
}

// What the threads of one call share.
struct Work {
    const MatMulProblem& problem;
    const MatMulPlan& plan;
    void* scratch;
};

void prepare_unit(void* data, size_t unit) {
    const Work& work = *static_cast<const Work*>(data);
    prepare_matmul(work.problem, work.plan, work.scratch, (int64_t)unit, (int64_t)unit + 1);
}

void run_unit(void* data, size_t unit) {
    const Work& work = *static_cast<const Work*>(data);
    run_matmul(work.problem, work.plan, work.scratch, (int64_t)unit, (int64_t)unit + 1);
}

OrtStatus* Kernel::run(OrtKernelContext* context, const MatMulProblem& call) const {
    const OrtApi* api = node.api();
    MatMulPlan plan;
    if (const char* error = plan_matmul(call, threads, kAutoIsa, &plan))
        return node.fail(kInvalidArgument, "%s", error);
    Scratch memory(api, scratch);
    OSL_RETURN_IF_FAILED(memory.reserve(context, (size_t)plan.scratch_bytes));
    Work work = {call, plan, memory.data()};
    if (plan.prepare_units == 1) {
        prepare_unit(&work, 0);
    } else if (plan.prepare_units > 1) {
        OSL_RETURN_IF_FAILED(ParallelFor::call(api, context, prepare_unit, (size_t)plan.prepare_units,
                                               (size_t)plan.prepare_units, &work));
    }
    if (plan.run_units == 1) {
        run_unit(&work, 0);
        return nullptr;
    }
    // As many batches as units: a thread that was held up leaves its share to others.
    const size_t units = (size_t)plan.run_units;
    return ParallelFor::call(api, context, run_unit, units, units, &work);
}

void destroy(void* state) {
    Kernel* kernel = static_cast<Kernel*>(state);
    if (kernel == nullptr) return;
    kernel->scratch.close(kernel->node.api());
    delete kernel;
}

OrtStatus* create(const Operator& op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    Kernel* made = new (std::nothrow) Kernel(api, info);
    if (made == nullptr) return fail(api, kFail, "%s: out of memory", kMatMulPacked.name);
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
    SymbolicShape a;
    OSL_RETURN_IF_FAILED(infer_input(api, context, kA, &a));
    const int64_t k = infer_integer(api, context, "K", 0), n = infer_integer(api, context, "N", 0);
    char activation[32];
    infer_text(api, context, "activation", activation, sizeof(activation));
    if (!a.known || n <= 0) return nullptr;
    const size_t last = a.shape.rank - 1;
    if (k > 0 && a.shape.dims[last] >= 0 && a.shape.dims[last] != k) {
        return fail(api, kInvalidGraph, "%s: the last dimension of A is %lld, not K = %lld", kMatMulPacked.name,
                    (long long)a.shape.dims[last], (long long)k);
    }
    a.shape.dims[last] = is_gate(activation) ? n / 2 : n;
    a.names[last] = "";
    return infer_output(api, context, a.type, a);
}

}  // namespace

const Definition kMatMulPacked = {"MatMulPacked", kInputs, kInputCount, kAnyFloat,
                                  create,         compute, destroy,     infer_shapes};

}  // namespace osl::ort
