// The C interface of the native library. Plain pointers and integers only, so that ctypes can call it; calls are
// thread-safe and keep no state between them.
#pragma once

#include <stdint.h>

#define OSL_EXPORT extern "C" __attribute__((visibility("default")))

// Raised whenever a struct or an enum below changes; the Python side refuses a library of another version.
#define OSL_ABI_VERSION 2

enum OslDtype { OSL_FLOAT32 = 0, OSL_FLOAT16 = 1, OSL_BFLOAT16 = 2 };
enum OslMethod { OSL_RTN = 0, OSL_SEARCH = 1, OSL_HQQ = 2 };
// Byte layouts are specified in custom_ops/layout.py.
enum OslLayout { OSL_NBITS = 0, OSL_BLOCKED_KN = 1, OSL_BLOCKED_NK = 2 };
enum OslIsa { OSL_ISA_AUTO = 0, OSL_ISA_SCALAR = 1, OSL_ISA_AVX2 = 2, OSL_ISA_AVX512 = 3 };
enum OslStatus { OSL_OK = 0, OSL_BAD_ARGUMENT = 1, OSL_NO_MEMORY = 2, OSL_UNSUPPORTED_ISA = 3 };

struct OslTileArgs {
    const void* weight;       // W[0, 0]; need not be aligned
    int64_t stride_k;         // elements from W[k, n] to W[k + 1, n]
    int64_t stride_n;         // elements from W[k, n] to W[k, n + 1]
    int64_t rows;             // K, the reduction axis
    int64_t columns;          // N of this tile
    int64_t block;            // rows that share a scale; 1 <= block
    const float* importance;  // d[K], finite and >= 0, or null for all ones
    uint8_t* codes;           // zero-filled buffers of the *whole* tensor
    void* scales;
    uint8_t* zero_points;   // null when symmetric
    int64_t first_column;   // where this tile lies in the whole tensor
    int64_t total_columns;  // columns of the whole tensor
    int32_t weight_dtype;   // OslDtype
    int32_t scale_dtype;    // OSL_FLOAT32 or OSL_FLOAT16
    int32_t bits;           // 2, 3, 4 or 8
    int32_t symmetric;      // 0 or 1
    int32_t method;         // OslMethod
    int32_t layout;         // OslLayout
    int32_t isa;            // OslIsa
};

struct OslTileStats {
    double sq_error;          // sum of (w - dequantized)^2 over the tile
    double sq_weight;         // sum of w^2
    int64_t nonfinite;        // NaN and infinite weights; they are quantized as 0
    int64_t first_nonfinite;  // smallest k * columns + n of those, or -1
};

OSL_EXPORT int32_t osl_abi_version(void);
OSL_EXPORT int32_t osl_best_isa(void);             // the OslIsa that OSL_ISA_AUTO means here
OSL_EXPORT int32_t osl_supports_isa(int32_t isa);  // 1 if this machine can run it
OSL_EXPORT int32_t osl_quantize_tile(const OslTileArgs* args, OslTileStats* stats);  // OslStatus
