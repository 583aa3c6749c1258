// Writes the codes of one block of rows and up to kLanes columns into the tensor's bytes. Layouts: see layout.py.
#pragma once

#include "packing/bits.h"
#include "quantize/kernel.h"
#include "quantize/lanes.h"

namespace osl {
namespace OSL_ISA {

// Consecutive codes of each lane, least significant first: whole 32-bit words side by side for all lanes, the rest one
// by one. The codes of lane i begin at bit first_bit + i * lane_bits of `base`.
inline void write_lane_streams(const int32_t* codes, int64_t count, int bits, uint8_t* base, int64_t first_bit,
                               int64_t lane_bits, int64_t lanes) {
    const int per_word = 32 / bits;
    const bool words_fit = 32 % bits == 0 && first_bit % 8 == 0 && lane_bits % 8 == 0;
    const int64_t words = words_fit ? count / per_word : 0;
    for (int64_t word = 0; word < words; word++) {
        const int32_t* from = codes + word * per_word * kLanes;
        alignas(64) uint32_t packed[kLanes];
        for (int lane = 0; lane < kLanes; lane += kWidth) {
            Words bundle = {};
            for (int i = 0; i < per_word; i++) bundle |= load<Words>(from + i * kLanes + lane) << (bits * i);
            store(packed + lane, bundle);
        }
        for (int64_t lane = 0; lane < lanes; lane++)
            memcpy(base + (first_bit + lane * lane_bits) / 8 + word * 4, packed + lane, 4);
    }
    for (int64_t lane = 0; lane < lanes; lane++)
        for (int64_t k = words * per_word; k < count; k++)
            or_code(base, first_bit + lane * lane_bits + k * bits, (uint32_t)codes[k * kLanes + lane]);
}

// kLanes codes of one row as kLanes * bits / 8 bytes.
inline void pack_row(const int32_t* codes, int bits, uint8_t* to) {
    if (bits == 8)
        for (int i = 0; i < kLanes; i++) to[i] = (uint8_t)codes[i];
    else if (bits == 4)
        for (int i = 0; i < kLanes / 2; i++) to[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    else
        for (int i = 0; i < kLanes / 4; i++)
            to[i] = (uint8_t)(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
}

// Consecutive codes of each row; rows are `row_codes` codes apart.
inline void write_rows(const int32_t* codes, int64_t rows, int bits, uint8_t* base, int64_t first_code,
                       int64_t row_codes, int64_t lanes) {
    for (int64_t k = 0; k < rows; k++, codes += kLanes) {
        const int64_t bit = (first_code + k * row_codes) * bits;
        if (lanes == kLanes && bit % 8 == 0) {
            pack_row(codes, bits, base + bit / 8);
        } else {
            for (int64_t lane = 0; lane < lanes; lane++) or_code(base, bit + lane * bits, (uint32_t)codes[lane]);
        }
    }
}

// Unsigned codes to two's complement of the storage width.
inline void make_signed(int32_t* codes, int64_t rows, int code_bits, int bits) {
    const int32_t offset = (1 << bits) - (1 << (code_bits - 1)), mask = (1 << bits) - 1;
    for (int64_t i = 0; i < rows * kLanes; i += kWidth) store(codes + i, (load<Ints>(codes + i) + offset) & mask);
}

// codes[rows][kLanes] is scratch: it is padded or converted in place.
inline void write_codes(const OslTileArgs& args, int32_t* codes, const float* zeros, int64_t block, int64_t rows,
                        int64_t column, int64_t lanes) {
    const int bits = storage_bits(args);
    const int64_t first_column = args.first_column + column;
    if (args.layout == OSL_BLOCKED_KN) {
        if (args.symmetric) make_signed(codes, rows, args.bits, bits);
        return write_rows(codes, rows, bits, args.codes, block * args.block * args.total_columns + first_column,
                          args.total_columns, lanes);
    }
    if (args.layout == OSL_BLOCKED_NK) {
        if (args.symmetric) make_signed(codes, rows, args.bits, bits);
        const int64_t first_bit = (first_column * args.rows + block * args.block) * bits;
        return write_lane_streams(codes, rows, bits, args.codes, first_bit, args.rows * bits, lanes);
    }
    for (int64_t k = rows; k < args.block; k++)  // a short last block is filled with the code of 0
        for (int lane = 0; lane < kLanes; lane++) codes[k * kLanes + lane] = (int32_t)zeros[lane];
    const int64_t block_bits = bytes_for(args.block, bits) * 8, column_bits = block_count(args) * block_bits;
    write_lane_streams(codes, args.block, bits, args.codes, first_column * column_bits + block * block_bits,
                       column_bits, lanes);
}

}  // namespace OSL_ISA
}  // namespace osl
