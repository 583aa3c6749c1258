#include "glue/inference.h"

namespace osl::ort {

OrtStatus* infer_input(const OrtApi* api, const OrtShapeInferContext* context, size_t index, SymbolicShape* shape) {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
    OSL_RETURN_IF_FAILED(ShapeContextGetInput::call(api, context, index, &info));
    OSL_RETURN_IF_FAILED(GetTensorElementType::call(api, info, &shape->type));
    size_t rank = 0;
    OSL_RETURN_IF_FAILED(GetDimensionsCount::call(api, info, &rank));
    // No dimension: either a scalar, which no input of ours is, or a shape that is not known.
    if (rank == 0 || rank > kMaxRank) return nullptr;
    shape->known = true;
    shape->shape.rank = rank;
    OSL_RETURN_IF_FAILED(GetDimensions::call(api, info, shape->shape.dims, rank));
    return GetSymbolicDimensions::call(api, info, shape->names, rank);
}

OrtStatus* infer_output(const OrtApi* api, OrtShapeInferContext* context, int32_t element_type,
                        const SymbolicShape& shape) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    OSL_RETURN_IF_FAILED(CreateTensorTypeAndShapeInfo::call(api, &info));
    const size_t rank = shape.shape.rank;
    const char* names[kMaxRank];
    for (size_t i = 0; i < rank; i++) names[i] = shape.names[i];
    OrtStatus* status = SetTensorElementType::call(api, info, element_type);
    if (status == nullptr) status = SetDimensions::call(api, info, shape.shape.dims, rank);
    if (status == nullptr) status = SetSymbolicDimensions::call(api, info, names, rank);
    if (status == nullptr) status = ShapeContextSetOutput::call(api, context, 0, info);
    ReleaseTensorTypeAndShapeInfo::call(api, info);
    return status;
}

int64_t infer_integer(const OrtApi* api, const OrtShapeInferContext* context, const char* attribute, int64_t fallback) {
    const OrtOpAttr* found = nullptr;
    int64_t value = fallback;
    size_t bytes = 0;
    if (!succeeded(api, ShapeContextGetAttribute::call(api, context, attribute, &found))) return fallback;
    return succeeded(api, ReadOpAttribute::call(api, found, kAttributeInt, &value, sizeof(value), &bytes)) ? value
                                                                                                           : fallback;
}

void infer_text(const OrtApi* api, const OrtShapeInferContext* context, const char* attribute, char* text,
                size_t size) {
    const OrtOpAttr* found = nullptr;
    size_t bytes = 0;
    text[0] = 0;
    if (!succeeded(api, ShapeContextGetAttribute::call(api, context, attribute, &found))) return;
    const bool read = succeeded(api, ReadOpAttribute::call(api, found, kAttributeString, text, size - 1, &bytes));
    text[read && bytes < size ? bytes : 0] = 0;
}

}  // namespace osl::ort
