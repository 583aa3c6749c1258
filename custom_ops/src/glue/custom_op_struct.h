// The callbacks by which ONNX Runtime asks for an operator, in the order that every release has kept since 1.17.
#pragma once

#include <cstddef>
#include <cstdint>

#include "glue/ort_table.h"

extern "C" {
struct OrtCustomOp {
    uint32_t release;  // 1.x: which of the callbacks are there. Runtimes refuse what is newer than they are.

    void* (*create_kernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);  // not called from 1.16 on
    const char* (*name)(const OrtCustomOp*);
    const char* (*execution_provider)(const OrtCustomOp*);  // null: CPU
    int32_t (*input_type)(const OrtCustomOp*, size_t);
    size_t (*input_count)(const OrtCustomOp*);
    int32_t (*output_type)(const OrtCustomOp*, size_t);
    size_t (*output_count)(const OrtCustomOp*);
    void (*compute)(void* kernel, OrtKernelContext*);  // not called from 1.16 on
    void (*destroy)(void* kernel);
    int32_t (*input_characteristic)(const OrtCustomOp*, size_t);  // required, optional, variadic
    int32_t (*output_characteristic)(const OrtCustomOp*, size_t);
    int32_t (*input_memory)(const OrtCustomOp*, size_t);
    int32_t (*variadic_input_minimum)(const OrtCustomOp*);
    int32_t (*variadic_input_same_type)(const OrtCustomOp*);
    int32_t (*variadic_output_minimum)(const OrtCustomOp*);
    int32_t (*variadic_output_same_type)(const OrtCustomOp*);
    OrtStatus* (*create_kernel_or_fail)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*compute_or_fail)(void* kernel, OrtKernelContext*);
    OrtStatus* (*infer_shapes)(const OrtCustomOp*, OrtShapeInferContext*);
    int32_t (*first_version)(const OrtCustomOp*);
    int32_t (*last_version)(const OrtCustomOp*);
    // 1.18 appended maps of inputs that outputs may overwrite. They are not read for `release` 17.
};
}

namespace osl::ort {

enum Characteristic : int32_t { kRequired = 0, kOptional = 1 };

// A pointer's place, counted in pointers from the first callback.
constexpr size_t callback(size_t place) { return sizeof(void*) * (1 + place); }

static_assert(offsetof(OrtCustomOp, create_kernel) == callback(0));
static_assert(offsetof(OrtCustomOp, compute) == callback(7));
static_assert(offsetof(OrtCustomOp, input_characteristic) == callback(9));
static_assert(offsetof(OrtCustomOp, input_memory) == callback(11));
static_assert(offsetof(OrtCustomOp, create_kernel_or_fail) == callback(16));
static_assert(offsetof(OrtCustomOp, infer_shapes) == callback(18));
static_assert(sizeof(OrtCustomOp) == callback(21));

}  // namespace osl::ort
