// RegisterCustomOps: the one symbol that runtimes look for.
#include <cstdlib>
#include <mutex>
#include <new>

#include "glue/include/onnxslim_llm_ops.h"
#include "glue/operator.h"

namespace osl::ort {
namespace {

const Definition* const kDefinitions[] = {&kMatMulPacked, &kGatherPacked, &kEmptyNode};
constexpr int32_t kElementTypes[] = {kFloat, kFloat16, kBfloat16};
constexpr size_t kDefinitionCount = sizeof(kDefinitions) / sizeof(kDefinitions[0]);
constexpr size_t kTypeCount = sizeof(kElementTypes) / sizeof(kElementTypes[0]);

// The domain of one runtime. It must outlive all sessions, and nobody says when the last one ends: it is never freed.
struct Registration {
    Registration* next = nullptr;
    const OrtApiBase* base = nullptr;
    OrtCustomOpDomain* domain = nullptr;
    Operator operators[kDefinitionCount * kTypeCount];
};

std::mutex registrations_lock;
Registration* registrations = nullptr;  // one, unless a process has loaded two copies of the runtime

// x of release 1.x. Asking for a table that is not there would make the runtime print a complaint.
uint32_t release_of(const OrtApiBase* base) {
    char* end = nullptr;
    const unsigned long major = std::strtoul(base->get_version_string(), &end, 10);
    if (major > 1) return UINT32_MAX;
    return major == 1 && *end == '.' ? (uint32_t)std::strtoul(end + 1, nullptr, 10) : 0;
}

OrtStatus* fill(const OrtApi* api, Registration* made) {
    Runtime runtime;
    const uint32_t release = release_of(made->base);
    runtime.keeps_allocators = release >= 18;
    runtime.shape_in_place = runtime.infers_optional_inputs = release >= 24;
    OSL_RETURN_IF_FAILED(CreateCustomOpDomain::call(api, kDomain, &made->domain));
    Operator* op = made->operators;
    for (const Definition* definition : kDefinitions) {
        for (const int32_t type : kElementTypes) {
            if (type != kFloat && definition->element_types == kFloatOnly) continue;
            *op = make_operator(*definition, api, type, runtime);
            OSL_RETURN_IF_FAILED(CustomOpDomainAdd::call(api, made->domain, &op->callbacks));
            op++;
        }
    }
    return nullptr;
}

OrtStatus* registration_of(const OrtApiBase* base, const OrtApi* api, Registration** found) {
    const std::lock_guard<std::mutex> guard(registrations_lock);
    for (*found = registrations; *found != nullptr; *found = (*found)->next) {
        if ((*found)->base == base) return nullptr;
    }
    Registration* made = new (std::nothrow) Registration;
    if (made == nullptr) return fail(api, kFail, "no memory for the operators of %s", kDomain);
    made->base = base;
    if (OrtStatus* status = fill(api, made)) {
        if (made->domain != nullptr) ReleaseCustomOpDomain::call(api, made->domain);
        delete made;
        return status;
    }
    made->next = registrations;
    registrations = *found = made;
    return nullptr;
}

}  // namespace
}  // namespace osl::ort

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    using namespace osl::ort;
    if (release_of(base) < kOldestRelease) {  // every release has the first entries of the table
        return fail(base->get_api(1), kFail, "%s needs ONNX Runtime 1.%u or newer; this is %s", kDomain, kOldestRelease,
                    base->get_version_string());
    }
    const OrtApi* api = base->get_api(kOldestRelease);
    Registration* registration = nullptr;
    OSL_RETURN_IF_FAILED(registration_of(base, api, &registration));
    return AddCustomOpDomain::call(api, options, registration->domain);
}
