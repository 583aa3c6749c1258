// Failures as ONNX Runtime wants them: a status with a message that names the node.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "glue/ort_table.h"

namespace osl::ort {

// "MatMulPacked 'node': ..." in printf's language. Long texts are cut.
__attribute__((format(printf, 3, 4))) inline OrtStatus* fail(const OrtApi* api, ErrorCode code, const char* format,
                                                             ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    return CreateStatus::call(api, code, text);
}

// Forgets a failure that is an answer, like that of a missing attribute. True if there was none.
inline bool succeeded(const OrtApi* api, OrtStatus* status) {
    if (status == nullptr) return true;
    ReleaseStatus::call(api, status);
    return false;
}

}  // namespace osl::ort

// Returns from the caller when a call into the runtime fails.
#define OSL_RETURN_IF_FAILED(call)                             \
    do {                                                       \
        if (OrtStatus* osl_status = (call)) return osl_status; \
    } while (false)
