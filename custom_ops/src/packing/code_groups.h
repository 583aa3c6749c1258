// 64 codes of one column, between MatMulNBits's bit stream and their places in a chunk: eight codes at a time in the
// bytes of a 64-bit word. code_place() says the same for one code; it serves where a column ends within 64 rows.
#pragma once

#include "packing/packed_weight.h"

namespace osl {

constexpr int32_t kGroupCodes = 64;

// Bytes of 64 codes: of one column in the stream, of 16 columns in a chunk.
static inline int32_t group_stream_bytes(int32_t bits) { return kGroupCodes * bits / 8; }
static inline int32_t group_chunk_bytes(int32_t bits) { return group_stream_bytes(bits) * kStripColumns; }

namespace group {

constexpr uint64_t kOnes = 0x0101010101010101u;

// The lowest `codes` codes of every `stride` bits.
template <int kBits>
constexpr uint64_t lowest(int codes, int stride) {
    uint64_t mask = 0;
    for (int at = 0; at < 64; at += stride) mask |= ((uint64_t{1} << (codes * kBits)) - 1) << at;
    return mask;
}

// Eight codes side by side to one in each byte, the first one lowest: halves are moved apart three times.
template <int kBits>
inline uint64_t spread(uint64_t x) {
    constexpr int kApart = 8 - kBits;  // what two neighbours are moved apart by
    if constexpr (kApart > 0) {
        constexpr uint64_t kFour = lowest<kBits>(4, 32), kTwo = lowest<kBits>(2, 16), kOne = lowest<kBits>(1, 8);
        x = (x | x << (4 * kApart)) & kFour;
        x = (x | x << (2 * kApart)) & kTwo;
        x = (x | x << kApart) & kOne;
    }
    return x;
}

// The inverse.
template <int kBits>
inline uint64_t gather(uint64_t x) {
    constexpr int kApart = 8 - kBits;
    if constexpr (kApart > 0) {
        constexpr uint64_t kFour = lowest<kBits>(4, 32), kTwo = lowest<kBits>(2, 16);
        x = (x | x >> kApart) & kTwo;
        x = (x | x >> (2 * kApart)) & kFour;
        x = (x | x >> (4 * kApart)) & ((uint64_t{1} << (8 * kBits)) - 1);
    }
    return x;
}

template <int kBits>
inline uint64_t load_codes(const uint8_t* stream, int32_t octet) {
    const uint8_t* from = stream + octet * kBits;
    if constexpr (kBits == 3) {  // put together in a register: in memory it would be written and read in other sizes
        return from[0] | (uint64_t)from[1] << 8 | (uint64_t)from[2] << 16;
    } else {
        uint64_t x = 0;
        memcpy(&x, from, kBits);
        return x;
    }
}

// Eight consecutive k of one column in two vectors, 4 each.
inline void store_octet(uint8_t* vector, uint64_t x) {
    const uint32_t first = (uint32_t)x, second = (uint32_t)(x >> 32);
    memcpy(vector, &first, 4);
    memcpy(vector + 64, &second, 4);
}

inline uint64_t load_octet(const uint8_t* vector) {
    uint32_t first, second;
    memcpy(&first, vector, 4);
    memcpy(&second, vector + 64, 4);
    return first | (uint64_t)second << 32;
}

// `kShared` codes of `kWidth` bits share a byte, 16 rows apart: the two octets of 16 rows for each of them. `codes`
// gives the eight codes of an octet, one in each byte.
template <int kShared, int kWidth, typename Codes>
inline void pack_planes(const Codes& codes, uint8_t* column) {
    constexpr int kSpans = kGroupCodes / 16 / kShared;
    for (int span = 0; span < kSpans; span++) {
        for (int half = 0; half < 2; half++) {
            uint64_t merged = 0;
            for (int i = 0; i < kShared; i++) merged |= codes((span * kShared + i) * 2 + half) << (i * kWidth);
            store_octet(column + (span * 2 + half) * 128, merged);
        }
    }
}

// Of the merged vectors of a group, which are read before anything is written.
template <int kShared, int kWidth>
inline uint64_t plane_octet(const uint64_t* merged, int octet) {
    const int span = octet / (2 * kShared), i = octet / 2 % kShared;
    return merged[span * 2 + octet % 2] >> (i * kWidth) & (((1u << kWidth) - 1) * kOnes);
}

constexpr int kHighBits = 256;  // where the third bits of 3-bit codes begin

template <int kBits>
inline void pack(const uint8_t* stream, uint8_t* column) {
    const auto codes = [stream](int octet) { return spread<kBits>(load_codes<kBits>(stream, octet)); };
    if constexpr (kBits == 3) {
        uint64_t apart[8], high = 0;
        for (int octet = 0; octet < 8; octet++) {
            apart[octet] = codes(octet);
            high |= (apart[octet] >> 2 & kOnes) << octet;
        }
        pack_planes<4, 2>([&apart](int octet) { return apart[octet] & (3 * kOnes); }, column);
        store_octet(column + kHighBits, high);
    } else {
        pack_planes<8 / kBits, kBits>(codes, column);
    }
}

template <int kBits>
inline void unpack(const uint8_t* column, uint8_t* stream) {
    constexpr int kWidth = kBits == 3 ? 2 : kBits, kShared = 8 / kWidth;
    uint64_t merged[8 / kShared];
    for (int i = 0; i < 8 / kShared; i++) merged[i] = load_octet(column + i * 128);
    const uint64_t high = kBits == 3 ? load_octet(column + kHighBits) : 0;
    for (int octet = 0; octet < 8; octet++) {
        uint64_t x = plane_octet<kShared, kWidth>(merged, octet);
        if constexpr (kBits == 3) x |= (high >> octet & kOnes) << 2;
        x = gather<kBits>(x);
        memcpy(stream + octet * kBits, &x, kBits);
    }
}

}  // namespace group

// `chunk` is where the codes of these 64 rows begin in the chunk.
inline void pack_group(int32_t bits, const uint8_t* stream, int32_t column, uint8_t* chunk) {
    uint8_t* place = chunk + column * 4;
    switch (bits) {
        case 8:
            return group::pack<8>(stream, place);
        case 4:
            return group::pack<4>(stream, place);
        case 3:
            return group::pack<3>(stream, place);
        default:
            return group::pack<2>(stream, place);
    }
}

inline void unpack_group(int32_t bits, const uint8_t* chunk, int32_t column, uint8_t* stream) {
    const uint8_t* place = chunk + column * 4;
    switch (bits) {
        case 8:
            return group::unpack<8>(place, stream);
        case 4:
            return group::unpack<4>(place, stream);
        case 3:
            return group::unpack<3>(place, stream);
        default:
            return group::unpack<2>(place, stream);
    }
}

}  // namespace osl
