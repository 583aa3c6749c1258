// Importance of rows, which costs nothing where there is none.
#pragma once

#include "quantize/lanes.h"

namespace osl {
namespace OSL_ISA {

template <bool kWeighted>
inline Floats weigh(const float* importance, int64_t k, Floats x) {
    return kWeighted ? importance[k] * x : x;
}

}  // namespace OSL_ISA
}  // namespace osl
