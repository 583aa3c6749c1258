#include "glue/inference.h"

#include <atomic>

#include "glue/operator.h"

namespace osl::ort {
namespace {

// A size that is not known and has no name must get one: the runtime takes it for a size of -1 otherwise, and folds
// that into Shape. Equal names mean equal sizes, so that every one is new.
struct FreshName {
    char text[40];

    const char* make() {
        static std::atomic<uint64_t> count{0};
        snprintf(text, sizeof(text), "%s.size_%llu", kDomain, (unsigned long long)count.fetch_add(1));
        return text;
    }
};

}  // namespace

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
    FreshName fresh[kMaxRank];
    for (size_t i = 0; i < rank; i++) {
        const bool nameless = shape.names[i][0] == 0;
        names[i] = shape.shape.dims[i] < 0 && nameless ? fresh[i].make() : shape.names[i];
    }
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
