#include "platform/instruction_set.h"

#include <cstdlib>
#include <cstring>

#ifdef OSL_X86_KERNELS
#include <cpuid.h>
#endif

namespace osl {
namespace {

#ifdef OSL_X86_KERNELS

struct X86Levels {
    bool avx2 = false;    // x86-64-v3
    bool avx512 = false;  // x86-64-v4
};

constexpr bool has_all(unsigned value, unsigned mask) { return (value & mask) == mask; }

// Register state that the operating system saves on a context switch (XGETBV, XCR0).
unsigned saved_state() {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

X86Levels detect() {
    constexpr unsigned kYmmState = 0x06, kZmmState = 0xE6;
    constexpr unsigned kFma = 1u << 12, kMovbe = 1u << 22, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
    constexpr unsigned kBmi1 = 1u << 3, kAvx2 = 1u << 5, kBmi2 = 1u << 8, kLzcnt = 1u << 5;
    constexpr unsigned kAvx512F = 1u << 16, kAvx512Dq = 1u << 17, kAvx512Cd = 1u << 28, kAvx512Bw = 1u << 30,
                       kAvx512Vl = 1u << 31;
    X86Levels levels;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return levels;
    if (!has_all(ecx, kFma | kMovbe | kOsxsave | kAvx | kF16c)) return levels;
    const unsigned state = saved_state();
    if (!__get_cpuid(0x80000001u, &eax, &ebx, &ecx, &edx) || !has_all(ecx, kLzcnt)) return levels;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return levels;
    levels.avx2 = has_all(ebx, kBmi1 | kAvx2 | kBmi2) && has_all(state, kYmmState);
    levels.avx512 = levels.avx2 && has_all(state, kZmmState) &&
                    has_all(ebx, kAvx512F | kAvx512Dq | kAvx512Cd | kAvx512Bw | kAvx512Vl);
    return levels;
}

const X86Levels& levels() {
    static const X86Levels detected = detect();
    return detected;
}

#endif

OslIsa choose() {
    OslIsa best = OSL_ISA_SCALAR;
    if (supports(OSL_ISA_AVX2)) best = OSL_ISA_AVX2;
    if (supports(OSL_ISA_AVX512)) best = OSL_ISA_AVX512;
    const char* wanted = std::getenv("ONNXSLIM_LLM_ISA");
    if (wanted == nullptr) return best;
    OslIsa named = best;
    if (std::strcmp(wanted, "scalar") == 0) named = OSL_ISA_SCALAR;
    // Names of product kernels (kernel_isa.cpp) mean the variant with the same registers.
    if (std::strcmp(wanted, "avx2") == 0 || std::strcmp(wanted, "avxvnni") == 0) named = OSL_ISA_AVX2;
    if (std::strcmp(wanted, "avx512") == 0) named = OSL_ISA_AVX512;
    return supports(named) ? named : best;
}

}  // namespace

bool supports(OslIsa isa) {
    switch (isa) {
        case OSL_ISA_AUTO:
        case OSL_ISA_SCALAR:
            return true;
#ifdef OSL_X86_KERNELS
        case OSL_ISA_AVX2:
            return levels().avx2;
        case OSL_ISA_AVX512:
            return levels().avx512;
#endif
        default:
            return false;
    }
}

OslIsa best_isa() {
    static const OslIsa chosen = choose();
    return chosen;
}

}  // namespace osl
