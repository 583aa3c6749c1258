// Checks the arguments, brings the memory and picks the instruction set.
#include <cstdlib>
#include <memory>
#include <new>

#include "interface/onnxslim_native.h"
#include "packing/pack_zero_points.h"
#include "platform/float_environment.h"
#include "platform/instruction_set.h"
#include "quantize/kernel.h"

namespace osl {
namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Zeroed, 64-byte aligned; null when there is no memory.
template <class T>
Buffer<T> allocate(int64_t count) {
    const size_t bytes = ((size_t)count * sizeof(T) + 63) / 64 * 64 + 64;
    void* p = std::aligned_alloc(64, bytes);
    if (p != nullptr) __builtin_memset(p, 0, bytes);
    return Buffer<T>((T*)p);
}

QuantizeTile kernel_of(OslIsa isa) {
    switch (isa) {
#ifdef OSL_X86_KERNELS
        case OSL_ISA_AVX2:
            return avx2::quantize_tile;
        case OSL_ISA_AVX512:
            return avx512::quantize_tile;
#endif
        default:
            return scalar::quantize_tile;
    }
}

bool within(int32_t value, int32_t last) { return value >= 0 && value <= last; }

bool valid(const OslTileArgs& a) {
    const bool known_bits = a.bits == 2 || a.bits == 3 || a.bits == 4 || a.bits == 8;
    const bool known_enums = within(a.weight_dtype, OSL_BFLOAT16) && within(a.scale_dtype, OSL_FLOAT16) &&
                             within(a.symmetric, 1) && within(a.method, OSL_HQQ) && within(a.layout, OSL_BLOCKED_NK) &&
                             within(a.isa, OSL_ISA_AVX512);
    const bool known_shape = a.rows >= 1 && a.columns >= 1 && a.block >= 1 && (a.block <= 256 || a.block == a.rows) &&
                             a.first_column >= 0 && a.first_column + a.columns <= a.total_columns;
    const bool buffers = a.weight && a.codes && a.scales && (a.symmetric || a.zero_points);
    return known_bits && known_enums && known_shape && buffers;
}

}  // namespace
}  // namespace osl

int32_t osl_abi_version(void) { return OSL_ABI_VERSION; }

int32_t osl_best_isa(void) { return osl::best_isa(); }

int32_t osl_supports_isa(int32_t isa) { return osl::supports((OslIsa)isa); }

int32_t osl_quantize_tile(const OslTileArgs* args, OslTileStats* stats) {
    using namespace osl;
    if (args == nullptr || stats == nullptr || !valid(*args)) return OSL_BAD_ARGUMENT;
    const OslIsa isa = args->isa == OSL_ISA_AUTO ? best_isa() : (OslIsa)args->isa;
    if (!supports(isa)) return OSL_UNSUPPORTED_ISA;

    const int64_t zero_points = args->symmetric ? 0 : args->columns * block_count(*args);
    const auto panel = allocate<float>(args->block * kLanes);
    const auto codes = allocate<int32_t>(args->block * kLanes);
    const auto staged = allocate<uint8_t>(zero_points);
    const auto error = allocate<double>(args->columns);
    const auto weight = allocate<double>(args->columns);
    if (!panel || !codes || !staged || !error || !weight) return OSL_NO_MEMORY;

    const DefaultFloatEnvironment environment;
    *stats = {0.0, 0.0, 0, -1};
    kernel_of(isa)(*args, {panel.get(), codes.get(), staged.get(), error.get(), weight.get()}, stats);
    if (!args->symmetric) pack_zero_points(*args, staged.get());
    for (int64_t n = 0; n < args->columns; n++) {
        stats->sq_error += error[n];
        stats->sq_weight += weight[n];
    }
    return OSL_OK;
}
