#include "glue/node.h"

#include <cstring>

namespace osl::ort {

Node::Node(const OrtApi* api, const OrtKernelInfo* info, const char* op) : api_(api), info_(info), op_(op) {
    size_t size = sizeof(name_);
    // A longer name fails: it is cut to nothing, and the runtime's own message tells it.
    if (!succeeded(api, KernelInfoGetNodeName::call(api, info, name_, &size))) name_[0] = 0;
}

OrtStatus* Node::fail(ErrorCode code, const char* format, ...) const {
    char text[320];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    return ort::fail(api_, code, "%s '%s': %s", op_, name_, text);
}

OrtStatus* Node::integer(const char* attribute, int64_t low, int64_t high, int64_t* value) const {
    if (!succeeded(api_, KernelInfoGetAttributeInt::call(api_, info_, attribute, value))) {
        return fail(kInvalidGraph, "the integer attribute %s is missing", attribute);
    }
    if (*value < low || *value > high) {
        return fail(kInvalidGraph, "%s = %lld is not between %lld and %lld", attribute, (long long)*value,
                    (long long)low, (long long)high);
    }
    return nullptr;
}

OrtStatus* Node::choice(const char* attribute, const char* const* choices, size_t count, int32_t fallback,
                        int32_t* place) const {
    *place = fallback;
    size_t size = 0;
    if (!succeeded(api_, KernelInfoGetAttributeString::call(api_, info_, attribute, nullptr, &size))) return nullptr;
    char text[32] = {};
    if (size <= sizeof(text)) {
        OSL_RETURN_IF_FAILED(KernelInfoGetAttributeString::call(api_, info_, attribute, text, &size));
        text[sizeof(text) - 1] = 0;
        for (size_t i = 0; i < count; i++) {
            if (std::strcmp(text, choices[i]) == 0) {
                *place = (int32_t)i;
                return nullptr;
            }
        }
    }
    char known[128] = {};
    for (size_t i = 0, used = 0; i < count && used < sizeof(known); i++) {
        used += snprintf(known + used, sizeof(known) - used, i ? ", %s" : "%s", choices[i]);
    }
    return fail(kInvalidGraph, "the attribute %s is none of %s", attribute, known);
}

OrtStatus* Node::last_dimension(size_t input, int64_t* size) const {
    *size = -1;
    OrtTypeInfo* type = nullptr;
    OSL_RETURN_IF_FAILED(KernelInfoGetInputTypeInfo::call(api_, info_, input, &type));
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;  // part of `type`
    size_t rank = 0;
    int64_t dims[kMaxRank];
    OrtStatus* status = CastTypeInfoToTensorInfo::call(api_, type, &tensor);
    if (status == nullptr && tensor != nullptr) status = GetDimensionsCount::call(api_, tensor, &rank);
    if (status == nullptr && rank >= 1 && rank <= kMaxRank) {
        status = GetDimensions::call(api_, tensor, dims, rank);
        if (status == nullptr) *size = dims[rank - 1];
    }
    ReleaseTypeInfo::call(api_, type);
    return status;
}

OrtStatus* Node::constant(size_t input, const char* what, bool shape_in_place, Tensor* tensor) const {
    size_t count = 0;
    OSL_RETURN_IF_FAILED(KernelInfoGetInputCount::call(api_, info_, &count));
    int32_t is_constant = 0;
    const OrtValue* value = nullptr;
    if (input < count) {
        OSL_RETURN_IF_FAILED(KernelInfoGetConstantInput::call(api_, info_, input, &is_constant, &value));
    }
    if (!is_constant || value == nullptr) {
        return fail(kInvalidGraph, "%s must be an initializer that nobody can replace", what);
    }
    return read_tensor(api_, shape_in_place, value, tensor);
}

}  // namespace osl::ort
