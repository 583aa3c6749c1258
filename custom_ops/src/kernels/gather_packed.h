// Single columns of a packed weight, dequantized: the rows of an embedding table that shares its bytes with a
// classifier.
#pragma once

#include "packing/packed_weight.h"

namespace osl {

// column[k] = scale * (code - zero point) for all K rows, in float32. The weight must have plain column order and
// 0 <= n < N. A column lies scattered over its strip: all of the strip's cache lines are read.
void read_column(const PackedWeight& weight, int64_t n, float* column);

}  // namespace osl
