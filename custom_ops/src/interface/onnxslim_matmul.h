// The C interface to the packed weights and their products, for ctypes: packing, tests, benchmarks. Runtimes use
// kernels/matmul.h. Calls are thread-safe and keep no state between them.
#pragma once

#include <stdint.h>

#include "interface/onnxslim_native.h"

struct OslPackedScheme {
    int64_t rows;  // K
    int64_t columns;
    int32_t bits;
    int32_t block;
    int32_t scale_type;    // ScaleType: float32, float16, bfloat16
    int32_t zero_points;   // 0 or 1
    int32_t column_order;  // ColumnOrder: plain, paired halves
};

// Mirrors osl::MatMulProblem.
struct OslMatMulArgs {
    const void* packed;
    int64_t packed_bytes;
    const void* a;
    void* y;
    int64_t m;
    int64_t a_stride;
    int64_t y_stride;
    const float* low_rank_u;
    const float* low_rank_v;
    int64_t rank;
    const void* bias;
    const void* residual;
    int64_t residual_stride;
    int32_t type;
    int32_t accuracy;
    int32_t activation;
    int32_t isa;
};

// 1 if this machine can run the KernelIsa; the one that 0 means.
OSL_EXPORT int32_t osl_supports_kernel_isa(int32_t isa);
OSL_EXPORT int32_t osl_best_kernel_isa(void);

// Bytes of the packed weight, or -1 where the scheme cannot be packed.
OSL_EXPORT int64_t osl_packed_bytes(const OslPackedScheme* scheme);
// Strips [first, last) between MatMulNBits's arrays and the packed weight; see packing/packed_weight.h. Null or what is
// wrong, as a static string.
OSL_EXPORT const char* osl_pack_weight(const OslPackedScheme* scheme, const uint8_t* codes, const void* scales,
                                       const uint8_t* zero_points, int64_t first, int64_t last, uint8_t* packed);
OSL_EXPORT const char* osl_parse_packed(const void* packed, int64_t bytes, OslPackedScheme* scheme);
OSL_EXPORT const char* osl_unpack_weight(const void* packed, int64_t bytes, uint8_t* codes, void* scales,
                                         uint8_t* zero_points);
// The sparse form of a packed weight (packing/sparse_weight.h) and back; bytes of either form, or -1 where `packed`
// or `sparse` is not what it should be.
OSL_EXPORT int64_t osl_sparse_bytes(const void* packed, int64_t bytes);
OSL_EXPORT const char* osl_make_sparse(const void* packed, int64_t bytes, int64_t sparse_bytes, uint8_t* sparse);
OSL_EXPORT int64_t osl_expanded_bytes(const void* sparse, int64_t bytes);
// Codes that are stored, or -1.
OSL_EXPORT int64_t osl_sparse_values(const void* sparse, int64_t bytes);
OSL_EXPORT const char* osl_expand_weight(const void* sparse, int64_t bytes, int32_t isa, uint8_t* packed);
// A whole product, its units one after the other as `threads` threads would share them. Null or what is wrong. `packed`
// may be sparse.
OSL_EXPORT const char* osl_matmul(const OslMatMulArgs* args, int64_t threads);
