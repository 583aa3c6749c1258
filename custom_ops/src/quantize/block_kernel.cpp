// The quantizer of one instruction set: loads, scales, rounds and packs kLanes columns of one block at a time.
// Compiled several times, with OSL_ISA naming the variant. custom_ops/reference.py is its specification, bit for bit.
#include "packing/write_codes.h"
#include "packing/write_scales.h"
#include "quantize/affine.h"
#include "quantize/half_quadratic.h"
#include "quantize/kernel.h"
#include "quantize/load_panel.h"
#include "quantize/search.h"

namespace osl {
namespace OSL_ISA {
namespace {

// The walk over the tile: stripes of columns, in them chunks of rows, in them kLanes columns by all blocks of the
// chunk. Wide enough to read whole cache lines of a row, short enough that a line of output is complete before it is
// evicted.
constexpr int64_t kStripeColumns = 256;
constexpr int64_t kChunkRows = 128;
// Float sums are carried on in double after so many rows.
constexpr int64_t kSumRows = 32;

void normalize(float* panel, int64_t rows, const Unit& unit) {
    for (int64_t k = 0; k < rows; k++) store(panel + k * kLanes, load<Floats>(panel + k * kLanes) * unit.inverse);
}

Affine choose_affine(const OslTileArgs& args, const Scheme& scheme, const Unit& unit, Range range, const float* panel,
                     int64_t row, int64_t rows) {
    if (args.method == OSL_RTN) return round_to_nearest(scheme, unit, range);
    if (args.importance == nullptr) {
        const auto choose = args.method == OSL_SEARCH ? search_scale<false> : split_scale<false>;
        return choose(scheme, unit, range, panel, nullptr, rows);
    }
    const auto choose = args.method == OSL_SEARCH ? search_scale<true> : split_scale<true>;
    return choose(scheme, unit, range, panel, args.importance + row, rows);
}

void add_to(double* sums, Floats addend) {
    float lanes[kWidth];
    store(lanes, addend);
    for (int i = 0; i < kWidth; i++) sums[i] += (double)lanes[i];
}

// Writes the codes of kWidth columns and adds their squared error and weight, in units, to the sums.
void encode(Scheme scheme, Affine affine, const float* panel, int64_t rows, int32_t* codes, double* error,
            double* weight) {
    for (int64_t start = 0; start < rows; start += kSumRows) {
        const int64_t stop = start + kSumRows < rows ? start + kSumRows : rows;
        Floats chunk_error = {}, chunk_weight = {};
        for (int64_t k = start; k < stop; k++) {
            const Floats x = load<Floats>(panel + k * kLanes);
            const Floats code = centred_code(scheme, affine, x);
            const Floats difference = x - affine.scale * code;
            chunk_error += difference * difference;
            chunk_weight += x * x;
            store(codes + k * kLanes, __builtin_convertvector(code + affine.zero, Ints));
        }
        add_to(error, chunk_error);
        add_to(weight, chunk_weight);
    }
}

template <int32_t kDtype>
void quantize_block(const OslTileArgs& args, const Scheme& scheme, const TileScratch& scratch, int64_t block,
                    int64_t column, OslTileStats* stats) {
    const int64_t row = block * args.block;
    const int64_t rows = args.rows - row < args.block ? args.rows - row : args.block;
    const int64_t columns = args.columns - column < kLanes ? args.columns - column : kLanes;
    load_panel<kDtype>(args, row, rows, column, columns, scratch.panel, stats);

    alignas(64) float scales[kLanes], zeros[kLanes], units[kLanes];
    double error[kLanes] = {}, weight[kLanes] = {};
    for (int lane = 0; lane < kLanes; lane += kWidth) {
        float* panel = scratch.panel + lane;
        Range range = range_of(panel, rows);
        const Unit unit = unit_of(range);
        range = {range.low * unit.inverse, range.high * unit.inverse};
        normalize(panel, rows, unit);
        const Affine affine = choose_affine(args, scheme, unit, range, panel, row, rows);
        encode(scheme, affine, panel, rows, scratch.codes + lane, error + lane, weight + lane);
        store(scales + lane, affine.scale * unit.size);
        store(zeros + lane, affine.zero);
        store(units + lane, unit.size);
    }
    for (int64_t n = 0; n < columns; n++) {
        const double squared_unit = (double)units[n] * (double)units[n];
        scratch.column_error[column + n] += error[n] * squared_unit;
        scratch.column_weight[column + n] += weight[n] * squared_unit;
    }
    write_codes(args, scratch.codes, zeros, block, rows, column, columns);
    write_scales(args, scales, block, column, columns);
    if (!args.symmetric) stage_zero_points(args, zeros, scratch.zero_points, block, column, columns);
}

template <int32_t kDtype>
void quantize_columns(const OslTileArgs& args, const TileScratch& scratch, OslTileStats* stats) {
    const Scheme scheme = scheme_of(args);
    const int64_t blocks = block_count(args);
    const int64_t chunk = args.block < kChunkRows ? kChunkRows / args.block : 1;
    for (int64_t stripe = 0; stripe < args.columns; stripe += kStripeColumns) {
        const int64_t stripe_end = stripe + kStripeColumns < args.columns ? stripe + kStripeColumns : args.columns;
        for (int64_t first = 0; first < blocks; first += chunk) {
            const int64_t last = first + chunk < blocks ? first + chunk : blocks;
            for (int64_t column = stripe; column < stripe_end; column += kLanes)
                for (int64_t block = first; block < last; block++)
                    quantize_block<kDtype>(args, scheme, scratch, block, column, stats);
        }
    }
}

}  // namespace

void quantize_tile(const OslTileArgs& args, const TileScratch& scratch, OslTileStats* stats) {
    switch (args.weight_dtype) {
        case OSL_FLOAT32:
            return quantize_columns<OSL_FLOAT32>(args, scratch, stats);
        case OSL_FLOAT16:
            return quantize_columns<OSL_FLOAT16>(args, scratch, stats);
        default:
            return quantize_columns<OSL_BFLOAT16>(args, scratch, stats);
    }
}

}  // namespace OSL_ISA
}  // namespace osl
