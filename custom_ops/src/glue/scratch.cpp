#include "glue/scratch.h"

namespace osl::ort {

// KernelContext_GetScratchBuffer would be made for this, but asks for the stream of a GPU: on a CPU it reads a null
// pointer, and nothing gives its memory back.

OrtStatus* ScratchSource::open(const Runtime& runtime, const OrtApi* api, const OrtKernelInfo* info) {
    constexpr int32_t kArena = 1;
    if (runtime.keeps_allocators) return KernelInfoGetAllocator::call(api, info, kDefaultMemory, &kept_);
    return CreateCpuMemoryInfo::call(api, kArena, kDefaultMemory, &cpu_);
}

void ScratchSource::close(const OrtApi* api) {
    if (kept_ != nullptr) ReleaseAllocator::call(api, kept_);
    if (cpu_ != nullptr) ReleaseMemoryInfo::call(api, cpu_);
}

OrtStatus* ScratchSource::take(const OrtApi* api, const OrtKernelContext* context, size_t bytes, OrtAllocator** from,
                               void** memory) const {
    *from = kept_;
    if (kept_ == nullptr) OSL_RETURN_IF_FAILED(KernelContextGetAllocator::call(api, context, cpu_, from));
    OrtStatus* status = AllocatorAlloc::call(api, *from, bytes, memory);
    if (status != nullptr && kept_ == nullptr) ReleaseAllocator::call(api, *from);
    return status;
}

void ScratchSource::give_back(const OrtApi* api, OrtAllocator* from, void* memory) const {
    succeeded(api, AllocatorFree::call(api, from, memory));
    if (kept_ == nullptr) ReleaseAllocator::call(api, from);
}

}  // namespace osl::ort
