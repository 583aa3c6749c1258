#include "glue/tensor.h"

#include <cstring>

namespace osl::ort {
namespace {

OrtStatus* too_many_dimensions(const OrtApi* api, size_t rank) {
    return fail(api, kInvalidArgument, "a tensor has %zu dimensions, more than %zu", rank, kMaxRank);
}

OrtStatus* read_info(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info, Tensor* tensor) {
    OSL_RETURN_IF_FAILED(GetTensorElementType::call(api, info, &tensor->type));
    size_t rank = 0;
    OSL_RETURN_IF_FAILED(GetDimensionsCount::call(api, info, &rank));
    if (rank > kMaxRank) return too_many_dimensions(api, rank);
    tensor->shape.rank = rank;
    return GetDimensions::call(api, info, tensor->shape.dims, rank);
}

}  // namespace

OrtStatus* read_tensor(const OrtApi* api, bool shape_in_place, const OrtValue* value, Tensor* tensor) {
    if (shape_in_place) {
        const int64_t* dims = nullptr;
        size_t rank = 0;
        OSL_RETURN_IF_FAILED(GetTensorElementTypeAndShapeData::call(api, value, &tensor->type, &dims, &rank));
        if (rank > kMaxRank) return too_many_dimensions(api, rank);
        tensor->shape.rank = rank;
        if (rank != 0) std::memcpy(tensor->shape.dims, dims, rank * sizeof(int64_t));
    } else {
        OrtTensorTypeAndShapeInfo* info = nullptr;
        OSL_RETURN_IF_FAILED(GetTensorTypeAndShape::call(api, value, &info));
        OrtStatus* status = read_info(api, info, tensor);
        ReleaseTensorTypeAndShapeInfo::call(api, info);
        OSL_RETURN_IF_FAILED(status);
    }
    // The entry takes a mutable value; inputs are only read.
    return GetTensorMutableData::call(api, const_cast<OrtValue*>(value), const_cast<void**>(&tensor->data));
}

OrtStatus* read_input(const OrtApi* api, bool shape_in_place, const OrtKernelContext* context, size_t index,
                      Tensor* tensor) {
    const OrtValue* value = nullptr;
    OSL_RETURN_IF_FAILED(KernelContextGetInput::call(api, context, index, &value));
    if (value == nullptr) return nullptr;
    return read_tensor(api, shape_in_place, value, tensor);
}

OrtStatus* make_output(const OrtApi* api, OrtKernelContext* context, const Shape& shape, void** data) {
    OrtValue* value = nullptr;
    OSL_RETURN_IF_FAILED(KernelContextGetOutput::call(api, context, 0, shape.dims, shape.rank, &value));
    return GetTensorMutableData::call(api, value, data);
}

}  // namespace osl::ort
