// The packed weight: one self-describing byte string that every kernel reads as it lies in the mapped file.
//
//   [header, 64 bytes] [strip 0] [strip 1] ...       strip = 16 columns, all of K;  chunk = chunk_rows of a strip
//   strip = chunk 0, chunk 1, ...                     K is padded to whole chunks, N to whole strips, both inside
//   chunk = codes | scales | zero points              contiguous, so that a strip is one forward stream
//
// Codes lie in the order of the four-way dot products (VNNI, sdot, AMX B tiles): a 64-byte vector holds, for each of
// the 16 columns, 4 consecutive k. Narrow codes share a byte with the code 16 rows further on, so that one mask or
// shift of a vector gives a vector of whole codes. Where code (k of the chunk, column c) lies is code_place().
// Scales: [blocks of the chunk][16]. Zero points: one byte each, [blocks][16]; codes of up to 4 bits put two blocks in
// a byte, the even one in the low nibble. Padding has code = zero point and scale 0. Little endian throughout.
//
// chunk_rows is 64, or the block where that is longer. Bytes per weight at 4 bits, block 32, half scales: 0.5625
// (0.578 with zero points). The file should place the string on a 64-byte boundary; kernels need no alignment.
//
// custom_ops/packed.py is the same specification in numpy. A change of any byte raises kPackedVersion.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace osl {

constexpr uint16_t kPackedVersion = 1;
constexpr char kPackedMagic[8] = {'o', 's', 'l', 'p', 'a', 'c', 'k', '\n'};
constexpr int kStripColumns = 16;

enum ScaleType : uint8_t { kScaleFloat32 = 0, kScaleFloat16 = 1, kScaleBfloat16 = 2 };

// kPairedHalves: the columns are two halves of N / 2, a gate and what it multiplies; even strips hold columns of the
// first half, odd strips the same columns of the second, each half padded to whole strips.
enum ColumnOrder : uint8_t { kPlainColumns = 0, kPairedHalves = 1 };

struct PackedHeader {
    char magic[8];
    uint16_t version;
    uint16_t header_bytes;  // where strip 0 begins
    uint8_t bits;           // 2, 3, 4 or 8
    uint8_t scale_type;     // ScaleType
    uint8_t zero_points;    // 0: the zero point of every block is 2^(bits - 1)
    uint8_t column_order;   // ColumnOrder
    int64_t rows;           // K
    int64_t columns;        // N
    uint32_t block;         // 16, 32, 64, 128 or 256
    uint32_t chunk_rows;
    uint32_t chunk_bytes;
    uint32_t strip_columns;  // kStripColumns
    int64_t payload_bytes;   // all strips
    uint8_t reserved[8];     // zero
};
static_assert(sizeof(PackedHeader) == 64, "the header is part of the file format");
static_assert(offsetof(PackedHeader, version) == 8 && offsetof(PackedHeader, bits) == 12, "file format");
static_assert(offsetof(PackedHeader, rows) == 16 && offsetof(PackedHeader, columns) == 24, "file format");
static_assert(offsetof(PackedHeader, block) == 32 && offsetof(PackedHeader, chunk_rows) == 36, "file format");
static_assert(offsetof(PackedHeader, chunk_bytes) == 40 && offsetof(PackedHeader, strip_columns) == 44, "file format");
static_assert(offsetof(PackedHeader, payload_bytes) == 48 && offsetof(PackedHeader, reserved) == 56, "file format");
static_assert(kStripColumns == 16, "the order of codes in a vector is part of the file format");
#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "kernels read the file as it lies");
#endif

// What does not depend on K and N.
struct PackedScheme {
    int32_t bits;
    int32_t block;
    ScaleType scale_type;
    bool zero_points;
};

static inline int64_t packed_round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
static inline int32_t scale_bytes(ScaleType type) { return type == kScaleFloat32 ? 4 : 2; }
static inline int32_t chunk_rows_of(const PackedScheme& s) { return s.block > 64 ? s.block : 64; }
static inline int32_t chunk_blocks(const PackedScheme& s) { return chunk_rows_of(s) / s.block; }
static inline int32_t chunk_scales_at(const PackedScheme& s) { return chunk_rows_of(s) * kStripColumns * s.bits / 8; }
static inline int32_t chunk_zeros_at(const PackedScheme& s) {
    return chunk_scales_at(s) + chunk_blocks(s) * kStripColumns * scale_bytes(s.scale_type);
}
static inline int32_t chunk_bytes_of(const PackedScheme& s) {
    const int32_t zero_rows = s.bits == 8 ? chunk_blocks(s) : (chunk_blocks(s) + 1) / 2;
    return chunk_zeros_at(s) + (s.zero_points ? zero_rows * kStripColumns : 0);
}

// Strips of N columns.
static inline int64_t strip_count(int64_t columns, ColumnOrder order) {
    return order == kPairedHalves ? 2 * ((columns / 2 + kStripColumns - 1) / kStripColumns)
                                  : (columns + kStripColumns - 1) / kStripColumns;
}

// First byte and shift of a code; 3-bit codes have their two low bits here and the third one at high_bit_place().
struct CodePlace {
    int32_t byte;
    int32_t shift;
};

static inline CodePlace code_place(int32_t bits, int32_t k, int32_t column) {
    const int32_t in_vector = column * 4 + k % 4;
    switch (bits) {
        case 8:
            return {k / 4 * 64 + in_vector, 0};
        case 4:
            return {k / 32 * 256 + k % 16 / 4 * 64 + in_vector, k % 32 / 16 * 4};
        case 3:
            return {k / 64 * 384 + k % 16 / 4 * 64 + in_vector, k % 64 / 16 * 2};
        default:
            return {k / 64 * 256 + k % 16 / 4 * 64 + in_vector, k % 64 / 16 * 2};
    }
}

static inline CodePlace high_bit_place(int32_t k, int32_t column) {
    return {k / 64 * 384 + 256 + k % 8 / 4 * 64 + column * 4 + k % 4, k % 64 / 8};
}

static inline uint32_t read_code(const uint8_t* chunk, int32_t bits, int32_t k, int32_t column) {
    const CodePlace place = code_place(bits, k, column);
    const uint32_t low = (uint32_t)chunk[place.byte] >> place.shift;
    if (bits != 3) return low & ((1u << bits) - 1u);
    const CodePlace high = high_bit_place(k, column);
    return (low & 3u) | (((uint32_t)chunk[high.byte] >> high.shift & 1u) << 2);
}

// The strings of one weight, with what the kernels need of the header worked out.
struct PackedWeight {
    const uint8_t* strips;
    int64_t rows;         // K
    int64_t columns;      // N
    int64_t padded_rows;  // K in whole chunks
    int64_t strip_bytes;
    int64_t strips_count;
    int32_t chunks;  // of a strip
    int32_t chunk_rows;
    int32_t chunk_bytes;
    int32_t scales_at;  // in a chunk
    int32_t zeros_at;
    int32_t block_shift;  // block = 1 << block_shift
    PackedScheme scheme;
    ColumnOrder order;
};

// Columns of the logical weight that a strip holds.
struct StripColumns {
    int64_t first;
    int32_t count;  // 1 to 16
};

static inline StripColumns columns_of_strip(const PackedWeight& w, int64_t strip) {
    const bool paired = w.order == kPairedHalves;
    const int64_t half = paired ? w.columns / 2 : w.columns;
    const int64_t start = (paired ? strip / 2 : strip) * kStripColumns;
    const int64_t left = half - start;
    return {start + (paired && strip % 2 ? half : 0), (int32_t)(left < kStripColumns ? left : kStripColumns)};
}

static inline int32_t zero_point(const PackedWeight& w, const uint8_t* chunk, int32_t block, int32_t column) {
    if (!w.scheme.zero_points) return 1 << (w.scheme.bits - 1);
    if (w.scheme.bits == 8) return chunk[w.zeros_at + block * kStripColumns + column];
    return chunk[w.zeros_at + block / 2 * kStripColumns + column] >> (block % 2 * 4) & 15;
}

// Reads the header of `size` bytes. Null when `weight` is filled in; otherwise what is wrong with them, in words for
// an error message: every byte that a kernel will read has then not been established to exist.
const char* parse_packed_weight(const void* bytes, size_t size, PackedWeight* weight);

// The view of strips that lie at `strips`, for sizes that packed_weight_bytes() accepts; and the header that says it.
PackedWeight view_packed_weight(const PackedScheme& scheme, int64_t rows, int64_t columns, ColumnOrder order,
                                const uint8_t* strips);
PackedHeader packed_header(const PackedWeight& weight);

// Bytes of a whole packed weight, header included, or -1 where K, N or the scheme is not one that can be packed.
int64_t packed_weight_bytes(const PackedScheme& scheme, int64_t rows, int64_t columns, ColumnOrder order);

// com.microsoft MatMulNBits's arrays: codes [N, KB, block * bits / 8], scales [N, KB] of the scheme's type, zero points
// [N, ceil(KB * bits / 8)] or null; a bit stream, lowest bits first. KB = ceil(K / block).
struct NBitsArrays {
    uint8_t* codes;
    uint8_t* scales;
    uint8_t* zero_points;
};

// Both directions lose nothing but codes beyond K, which come back as the zero point of their block. Strips
// [first_strip, last_strip) only, so that a caller can share the work out; the header is written with strip 0.
// `packed` has packed_weight_bytes() bytes.
void pack_weight(const NBitsArrays& from, const PackedScheme& scheme, int64_t rows, int64_t columns, ColumnOrder order,
                 int64_t first_strip, int64_t last_strip, uint8_t* packed);
void unpack_weight(const PackedWeight& from, int64_t first_strip, int64_t last_strip, const NBitsArrays& to);

}  // namespace osl
