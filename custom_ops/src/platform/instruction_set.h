// Which compiled variant of the kernels this machine can run.
#pragma once

#include "interface/onnxslim_native.h"

namespace osl {

bool supports(OslIsa isa);

// The widest supported variant, or the one that the environment variable ONNXSLIM_LLM_ISA (scalar, avx2, avx512) names
// if this machine supports it. Decided once per process.
OslIsa best_isa();

}  // namespace osl
