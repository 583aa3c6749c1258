// Which of the product kernels this machine can run.
#include <cstdlib>
#include <cstring>

#include "kernels/matmul.h"
#include "platform/instruction_set.h"

#ifdef OSL_X86_KERNELS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace osl {
namespace {

constexpr const char* kNames[kKernelIsas] = {"auto",       "scalar", "avx2",         "avxvnni",
                                             "avx512vnni", "amx",    "neon_dotprod", "neon_i8mm"};

struct Features {
    bool has[kKernelIsas] = {};
};

#ifdef OSL_X86_KERNELS

// Linux gives a process the tile registers only when it asks for them.
bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Features detect() {
    constexpr unsigned kAvx512Vbmi = 1u << 1, kAvx512Vbmi2 = 1u << 6, kAvx512Vnni = 1u << 11, kAmxBf16 = 1u << 22,
                       kAmxTile = 1u << 24, kAmxInt8 = 1u << 25, kAvxVnni = 1u << 4, kAvx512Bf16 = 1u << 5;
    Features f;
    f.has[kIsaAvx2] = supports(OSL_ISA_AVX2);
    unsigned highest, ebx, ecx, edx, eax1, unused;
    if (!f.has[kIsaAvx2] || !__get_cpuid_count(7, 0, &highest, &ebx, &ecx, &edx)) return f;
    if (highest < 1 || !__get_cpuid_count(7, 1, &eax1, &unused, &unused, &unused)) eax1 = 0;
    f.has[kIsaAvxVnni] = (eax1 & kAvxVnni) != 0;
    constexpr unsigned kBytes = kAvx512Vbmi | kAvx512Vbmi2 | kAvx512Vnni;
    f.has[kIsaAvx512Vnni] = supports(OSL_ISA_AVX512) && (ecx & kBytes) == kBytes;
    constexpr unsigned kTiles = kAmxBf16 | kAmxTile | kAmxInt8;
    f.has[kIsaAmx] = f.has[kIsaAvx512Vnni] && (eax1 & kAvx512Bf16) && (edx & kTiles) == kTiles && request_tiles();
    return f;
}

#elif defined(OSL_NEON_KERNELS)

Features detect() {
    Features f;
#if defined(__linux__)
    constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;
    f.has[kIsaNeonDotprod] = (getauxval(AT_HWCAP) & kDotprod) != 0;
    f.has[kIsaNeonI8mm] = f.has[kIsaNeonDotprod] && (getauxval(AT_HWCAP2) & kI8mm) != 0;
#elif defined(__APPLE__)
    const auto has = [](const char* name) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    f.has[kIsaNeonDotprod] = has("hw.optional.arm.FEAT_DotProd");
    f.has[kIsaNeonI8mm] = f.has[kIsaNeonDotprod] && has("hw.optional.arm.FEAT_I8MM");
#endif
    return f;
}

#else

Features detect() { return {}; }

#endif

KernelIsa choose() {
    KernelIsa best = kIsaScalar;
    for (int32_t isa = kIsaScalar; isa < kKernelIsas; isa++)
        if (supports((KernelIsa)isa)) best = (KernelIsa)isa;
    const char* wanted = std::getenv("ONNXSLIM_LLM_ISA");
    if (wanted == nullptr) return best;
    for (int32_t isa = kIsaScalar; isa < kKernelIsas; isa++)
        if (std::strcmp(wanted, kNames[isa]) == 0 && supports((KernelIsa)isa)) return (KernelIsa)isa;
    return best;
}

}  // namespace

bool supports(KernelIsa isa) {
    static const Features features = detect();
    if (isa < 0 || isa >= kKernelIsas) return false;
    return isa <= kIsaScalar || features.has[isa];
}

KernelIsa best_kernel_isa() {
    static const KernelIsa chosen = choose();
    return chosen;
}

}  // namespace osl
