// What a node of the graph says about itself when its kernel is created.
#pragma once

#include "glue/tensor.h"

namespace osl::ort {

// What differs between the runtimes that this process has loaded.
struct Runtime {
    bool keeps_allocators = false;        // 1.18: a kernel can hold an allocator
    bool shape_in_place = false;          // 1.24: shapes need not be copied
    bool infers_optional_inputs = false;  // 1.24: shape inference survives inputs that are left out
};

class Node {
public:
    Node(const OrtApi* api, const OrtKernelInfo* info, const char* op);

    const OrtApi* api() const { return api_; }
    const OrtKernelInfo* info() const { return info_; }
    const char* op() const { return op_; }
    const char* name() const { return name_; }

    // A message that begins with the operator and the node's name.
    __attribute__((format(printf, 3, 4))) OrtStatus* fail(ErrorCode code, const char* format, ...) const;

    // Integer attribute in [low, high]; it must be there.
    OrtStatus* integer(const char* attribute, int64_t low, int64_t high, int64_t* value) const;

    // Place of a string attribute among `choices`; `fallback` where there is no such attribute.
    OrtStatus* choice(const char* attribute, const char* const* choices, size_t count, int32_t fallback,
                      int32_t* place) const;

    // Size of the last dimension of an input where the model says it, otherwise -1.
    OrtStatus* last_dimension(size_t input, int64_t* size) const;

    // A tensor input that is an initializer, known for as long as the session lives.
    OrtStatus* constant(size_t input, const char* what, bool shape_in_place, Tensor* tensor) const;

private:
    const OrtApi* api_;
    const OrtKernelInfo* info_;
    const char* op_;
    char name_[128];
};

}  // namespace osl::ort
