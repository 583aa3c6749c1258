// Working memory of one call: on the stack while it is small, from the session's own allocator otherwise.
#pragma once

#include "glue/node.h"

namespace osl::ort {

// Enough for one token at any K in use; also what a call may take of the smallest thread stacks (128 KiB).
constexpr size_t kStackScratch = 48 << 10;
constexpr size_t kScratchAlignment = 64;

// The allocator of a kernel, where the runtime lets one keep it (1.18); older ones are asked in every call.
class ScratchSource {
public:
    OrtStatus* open(const Runtime& runtime, const OrtApi* api, const OrtKernelInfo* info);
    void close(const OrtApi* api);

    OrtStatus* take(const OrtApi* api, const OrtKernelContext* context, size_t bytes, OrtAllocator** from,
                    void** memory) const;
    void give_back(const OrtApi* api, OrtAllocator* from, void* memory) const;

private:
    OrtAllocator* kept_ = nullptr;
    OrtMemoryInfo* cpu_ = nullptr;
};

class Scratch {
public:
    Scratch(const OrtApi* api, const ScratchSource& source) : api_(api), source_(source) {}
    ~Scratch() {
        if (memory_ != nullptr) source_.give_back(api_, from_, memory_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    OrtStatus* reserve(const OrtKernelContext* context, size_t bytes) {
        if (bytes <= sizeof(small_)) return nullptr;
        OSL_RETURN_IF_FAILED(source_.take(api_, context, bytes + kScratchAlignment, &from_, &memory_));
        const uintptr_t start = (uintptr_t)memory_;
        aligned_ = (void*)((start + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment);
        return nullptr;
    }
    void* data() { return aligned_ != nullptr ? aligned_ : small_; }

private:
    const OrtApi* api_;
    const ScratchSource& source_;
    OrtAllocator* from_ = nullptr;
    void* memory_ = nullptr;
    void* aligned_ = nullptr;
    alignas(kScratchAlignment) unsigned char small_[kStackScratch];  // not initialised
};

}  // namespace osl::ort
