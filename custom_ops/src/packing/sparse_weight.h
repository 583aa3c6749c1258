// The sparse packed weight: a packed weight (packed_weight.h) without the codes that are the zero point of their block.
//
//   [header, 64 bytes] [where strips begin: (strips + 1) x uint64] [strip 0] [strip 1] ... [64 bytes of nothing]
//   strip = chunk 0, chunk 1, ...         chunk = bitmap | scales | zero points | values
//
// A chunk has the rows, columns, scales and zero points of the packed weight's chunk. Its bitmap has a bit for every
// code, in the order of the products' vectors: bit c * 4 + k % 4 of 64-bit word k / 4 is row k of the chunk, column c.
// Its values are the codes whose bits are set, in that order. Those of 8 bits are a byte each. Those of 4 bits are two
// to a byte, as in the packed weight: the low nibbles are the codes of rows 0 to 15 of every 32 one after the other,
// the high ones those of rows 16 to 31; there are as many bytes as the longer of both needs, so that a vector of codes
// is a load and a mask or shift. Codes of 2 and 3 bits are not stored sparse.
//
// Offsets count from the end of the header; the last one is the end of the last strip. The bytes behind that are zero:
// kernels read whole vectors.
//
// A weight of density d (codes that are not the zero point) takes d * bits + 1 bits a place beside its scales, where
// the packed weight takes `bits`, and up to 2 % more at 4 bits, where a chunk's nibbles are not shared out evenly: less
// wherever d < 1 - 1 / bits. Positions of 2 bits for the two of a "2:4" pattern would take 4 bits for 4 places, like
// their bitmap.
//
// custom_ops/sparse.py is the same specification in numpy. A change of any byte raises kSparseVersion.
#pragma once

#include "packing/packed_weight.h"

namespace osl {

constexpr uint16_t kSparseVersion = 1;
constexpr char kSparseMagic[8] = {'o', 's', 'l', 's', 'p', 'a', 'r', '\n'};
constexpr int64_t kSparseTail = 64;
constexpr int32_t kWordRows = 4;  // of K in a word of the bitmap, all 16 columns

// The header is a PackedHeader whose chunk_bytes are those of a chunk without its values.

struct SparseWeight {
    PackedWeight packed;     // what it expands to; its `strips` are null
    const uint8_t* payload;  // what follows the header
    int64_t payload_bytes;
    int64_t values;                          // codes that are stored
    int32_t scales_at, zeros_at, values_at;  // in a chunk

    int64_t strip_at(int64_t strip) const {
        uint64_t at;
        memcpy(&at, payload + strip * (int64_t)sizeof at, sizeof at);
        return (int64_t)at;
    }
};

// Whether the codes of a word's rows lie in the high nibbles.
static inline bool in_high_nibbles(int32_t bits, int32_t word) { return bits == 4 && word % 8 >= 4; }

static inline uint64_t bitmap_word(const uint8_t* chunk, int32_t word) {
    uint64_t bits;
    memcpy(&bits, chunk + word * 8, sizeof bits);
    return bits;
}

// Whether these bytes mean to be a sparse packed weight.
bool has_sparse_magic(const void* bytes, size_t size);

// Null when `weight` is filled in; otherwise what is wrong, in words for an error message. Reads all bitmaps: every
// byte that expanding or multiplying will read has then been established to exist.
const char* parse_sparse_weight(const void* bytes, size_t size, SparseWeight* weight);

// Bytes of the packed weight that it expands to, header included.
static inline int64_t expanded_bytes(const SparseWeight& weight) {
    return (int64_t)sizeof(PackedHeader) + weight.packed.strip_bytes * weight.packed.strips_count;
}

// Bytes of the sparse form of a packed weight, header included, or -1 where its codes are of 2 or 3 bits. Counts them.
int64_t sparse_weight_bytes(const PackedWeight& weight);
// `bytes` is what sparse_weight_bytes() said.
void make_sparse(const PackedWeight& weight, int64_t bytes, uint8_t* sparse);

}  // namespace osl
