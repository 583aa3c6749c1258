#include "glue/operator.h"

namespace osl::ort {
namespace {

const Operator& self(const OrtCustomOp* op) { return *reinterpret_cast<const Operator*>(op); }

const char* name(const OrtCustomOp* op) { return self(op).definition->name; }
const char* execution_provider(const OrtCustomOp*) { return nullptr; }
size_t input_count(const OrtCustomOp* op) { return self(op).definition->input_count; }
size_t output_count(const OrtCustomOp*) { return 1; }
int32_t output_type(const OrtCustomOp* op, size_t) { return self(op).element_type; }
int32_t required(const OrtCustomOp*, size_t) { return kRequired; }
int32_t default_memory(const OrtCustomOp*, size_t) { return kDefaultMemory; }
int32_t version(const OrtCustomOp*) { return kDomainVersion; }

int32_t input_type(const OrtCustomOp* op, size_t index) {
    const int32_t type = self(op).definition->inputs[index].type;
    return type == kSameAsOutput ? self(op).element_type : type;
}

int32_t input_characteristic(const OrtCustomOp* op, size_t index) {
    return self(op).definition->inputs[index].characteristic;
}

OrtStatus* create_kernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    *kernel = nullptr;
    return self(op).definition->create(self(op), api, info, kernel);
}

OrtStatus* infer_shapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
    return self(op).definition->infer_shapes(self(op).api, context);
}

bool has_optional_inputs(const Definition& definition) {
    for (size_t i = 0; i < definition.input_count; i++) {
        if (definition.inputs[i].characteristic == kOptional) return true;
    }
    return false;
}

}  // namespace

Operator make_operator(const Definition& definition, const OrtApi* api, int32_t element_type, const Runtime& runtime) {
    Operator made = {};
    made.callbacks.release = kOldestRelease;
    made.callbacks.name = name;
    made.callbacks.execution_provider = execution_provider;
    made.callbacks.input_type = input_type;
    made.callbacks.input_count = input_count;
    made.callbacks.output_type = output_type;
    made.callbacks.output_count = output_count;
    made.callbacks.destroy = definition.destroy;
    made.callbacks.input_characteristic = input_characteristic;
    made.callbacks.output_characteristic = required;
    made.callbacks.input_memory = default_memory;
    made.callbacks.create_kernel_or_fail = create_kernel;
    made.callbacks.compute_or_fail = definition.compute;
    // Before 1.24 runtimes read a null pointer when an optional input is left out and there is an inference function.
    if (runtime.infers_optional_inputs || !has_optional_inputs(definition)) made.callbacks.infer_shapes = infer_shapes;
    made.callbacks.first_version = version;
    made.callbacks.last_version = version;
    made.definition = &definition;
    made.api = api;
    made.element_type = element_type;
    made.runtime = runtime;
    return made;
}

}  // namespace osl::ort
