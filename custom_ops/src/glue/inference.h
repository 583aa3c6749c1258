// Shape inference: what a node's output is before anything runs.
#pragma once

#include "glue/tensor.h"

namespace osl::ort {

// A shape with unknown dimensions: -1, with a name or "".
struct SymbolicShape {
    bool known = false;  // the rank
    int32_t type = kUndefined;
    Shape shape;
    const char* names[kMaxRank];
};

OrtStatus* infer_input(const OrtApi* api, const OrtShapeInferContext* context, size_t index, SymbolicShape* shape);
OrtStatus* infer_output(const OrtApi* api, OrtShapeInferContext* context, int32_t element_type,
                        const SymbolicShape& shape);

// Attributes; `fallback`, or no text, where they are missing or of another type.
int64_t infer_integer(const OrtApi* api, const OrtShapeInferContext* context, const char* attribute, int64_t fallback);
void infer_text(const OrtApi* api, const OrtShapeInferContext* context, const char* attribute, char* text, size_t size);

}  // namespace osl::ort
