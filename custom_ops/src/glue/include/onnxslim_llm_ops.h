/* The operators of onnxslim-llm for ONNX Runtime, for programs in C and C++.
 *
 *     OrtStatus* status = RegisterCustomOps(session_options, OrtGetApiBase());
 *
 * or, without linking: OrtApi.RegisterCustomOpsLibrary_V2(session_options, "libonnxslim_llm_ops.so"). The operators are
 * those of the domain "onnxslim_llm.ops"; ONNX Runtime 1.17 or newer is needed. docs/custom-ops.md describes them. */
#ifndef ONNXSLIM_LLM_OPS_H
#define ONNXSLIM_LLM_OPS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef struct OrtStatus OrtStatus;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtApiBase OrtApiBase;

/* Makes the operators known to the sessions that these options open. May be called by several threads, and for any
 * number of options. Null is success; any other status is the caller's to release. */
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

#ifdef __cplusplus
}
#endif

#endif
