// Brings kLanes columns of one block of rows into a float panel: any strides, any of the three types, NaN and infinity
// replaced by 0 and counted.
#pragma once

#include "quantize/kernel.h"
#include "quantize/lanes.h"
#include "quantize/widen.h"

namespace osl {
namespace OSL_ISA {

template <int32_t kDtype>
struct Source;
template <>
struct Source<OSL_FLOAT32> {
    typedef uint32_t Element;
    static Floats widen(const void* from) { return widen_float32(from); }
};
template <>
struct Source<OSL_FLOAT16> {
    typedef uint16_t Element;
    static Floats widen(const void* from) { return widen_float16(from); }
};
template <>
struct Source<OSL_BFLOAT16> {
    typedef uint16_t Element;
    static Floats widen(const void* from) { return widen_bfloat16(from); }
};

template <class Element>
inline Element read(const char* base, int64_t index) {
    Element e;
    memcpy(&e, base + index * (int64_t)sizeof(Element), sizeof e);
    return e;
}

template <class Element>
void count_nonfinite(const OslTileArgs& args, int64_t row, int64_t rows, int64_t column, int64_t columns,
                     OslTileStats* stats) {
    const Element exponent =
        sizeof(Element) == 4 ? (Element)kExponent : (Element)(args.weight_dtype == OSL_FLOAT16 ? 0x7C00 : 0x7F80);
    const char* base = (const char*)args.weight;
    for (int64_t k = row; k < row + rows; k++)
        for (int64_t n = column; n < column + columns; n++) {
            if ((read<Element>(base, k * args.stride_k + n * args.stride_n) & exponent) != exponent) continue;
            const int64_t where = k * args.columns + n;
            if (stats->nonfinite++ == 0 || where < stats->first_nonfinite) stats->first_nonfinite = where;
        }
}

// panel[k][lane] = W[row + k, column + lane] as float; lanes from `columns` (1..kLanes) on are 0.
template <int32_t kDtype>
void load_panel(const OslTileArgs& args, int64_t row, int64_t rows, int64_t column, int64_t columns, float* panel,
                OslTileStats* stats) {
    typedef typename Source<kDtype>::Element Element;
    const char* base = (const char*)args.weight;
    const bool in_place = args.stride_n == 1 && columns == kLanes;
    Element gathered[kLanes] = {};
    Ints bad = {};
    for (int64_t k = 0; k < rows; k++) {
        const int64_t start = (row + k) * args.stride_k + column * args.stride_n;
        const char* from = base + start * (int64_t)sizeof(Element);
        if (!in_place) {
            for (int64_t n = 0; n < columns; n++) gathered[n] = read<Element>(base, start + n * args.stride_n);
            from = (const char*)gathered;
        }
        for (int lane = 0; lane < kLanes; lane += kWidth) {
            const Floats x = Source<kDtype>::widen(from + lane * sizeof(Element));
            const Ints special = ((Ints)x & kExponent) == kExponent;
            bad |= special;
            store(panel + k * kLanes + lane, (Floats)((Ints)x & ~special));
        }
    }
    if (any(bad)) count_nonfinite<Element>(args, row, rows, column, columns, stats);
}

}  // namespace OSL_ISA
}  // namespace osl
