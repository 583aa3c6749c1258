// Header checks and the two directions between MatMulNBits's arrays and the packed weight.
#include "packing/packed_weight.h"

#include "packing/code_groups.h"

namespace osl {
namespace {

// Far beyond every model, and small enough that no product below overflows.
constexpr int64_t kMaxDimension = int64_t{1} << 31;

bool known_scheme(const PackedScheme& s) {
    const bool bits = s.bits == 2 || s.bits == 3 || s.bits == 4 || s.bits == 8;
    const bool block = s.block == 16 || s.block == 32 || s.block == 64 || s.block == 128 || s.block == 256;
    return bits && block && s.scale_type <= kScaleBfloat16;
}

// Zero where it does not fit into 62 bits.
int64_t payload_bytes_of(const PackedScheme& s, int64_t rows, int64_t columns, ColumnOrder order) {
    const int64_t chunks = (rows + chunk_rows_of(s) - 1) / chunk_rows_of(s), strips = strip_count(columns, order);
    const int64_t strip_bytes = chunks * chunk_bytes_of(s);  // below 2^31 / 64 * 2^13
    return strip_bytes > (int64_t{1} << 62) / strips ? 0 : strip_bytes * strips;
}

// Bit streams of MatMulNBits.
uint32_t read_bits(const uint8_t* stream, int64_t bit, int32_t bits) {
    const int32_t offset = (int32_t)(bit & 7);
    uint32_t window = stream[bit >> 3];
    if (offset + bits > 8) window |= (uint32_t)stream[(bit >> 3) + 1] << 8;
    return window >> offset & ((1u << bits) - 1u);
}

void or_bits(uint8_t* stream, int64_t bit, uint32_t code) {
    const uint32_t shifted = code << (bit & 7);
    stream[bit >> 3] |= (uint8_t)shifted;
    if (shifted >> 8) stream[(bit >> 3) + 1] |= (uint8_t)(shifted >> 8);
}

// Where things of one column lie in MatMulNBits's arrays.
struct NBitsStrides {
    int64_t blocks;
    int64_t block_bytes;
    int64_t zero_bytes;
    int32_t scale;

    NBitsStrides(const PackedScheme& s, int64_t rows)
        : blocks((rows + s.block - 1) / s.block),
          block_bytes((int64_t)s.block * s.bits / 8),
          zero_bytes((blocks * s.bits + 7) / 8),
          scale(scale_bytes(s.scale_type)) {}

    // Blocks are stored in full, one after the other: a column is one bit stream.
    int64_t column_bytes() const { return blocks * block_bytes; }
};

// Zero point of a block, or the middle of the range where there is none or `n` is -1.
uint32_t zero_of(const NBitsArrays& from, const PackedScheme& s, const NBitsStrides& strides, int64_t block,
                 int64_t n) {
    if (!s.zero_points || n < 0) return 1u << (s.bits - 1);
    return read_bits(from.zero_points + n * strides.zero_bytes, block * s.bits, s.bits);
}

void put_code(uint8_t* chunk, int32_t bits, int32_t k, int32_t column, uint32_t code) {
    const CodePlace place = code_place(bits, k, column);
    chunk[place.byte] |= (uint8_t)((bits == 3 ? code & 3u : code) << place.shift);
    if (bits != 3) return;
    const CodePlace high = high_bit_place(k, column);
    chunk[high.byte] |= (uint8_t)(code >> 2 << high.shift);
}

void put_zero_point(const PackedWeight& w, uint8_t* chunk, int32_t block, int32_t column, uint32_t zero) {
    if (w.scheme.bits == 8)
        chunk[w.zeros_at + block * kStripColumns + column] = (uint8_t)zero;
    else
        chunk[w.zeros_at + block / 2 * kStripColumns + column] |= (uint8_t)(zero << (block % 2 * 4));
}

// Scales and zero points of one block: `n` is the column of the logical weight, or -1 for padding.
void pack_block(const NBitsArrays& from, const PackedWeight& w, const NBitsStrides& strides, int64_t block, int64_t n,
                int32_t column, uint8_t* chunk) {
    const PackedScheme& s = w.scheme;
    const int32_t in_chunk = (int32_t)(block % chunk_blocks(s));
    const bool real = n >= 0 && block < strides.blocks;
    if (s.zero_points) put_zero_point(w, chunk, in_chunk, column, zero_of(from, s, strides, block, real ? n : -1));
    if (real)
        memcpy(chunk + w.scales_at + (in_chunk * kStripColumns + column) * strides.scale,
               from.scales + (n * strides.blocks + block) * strides.scale, (size_t)strides.scale);
}

// 64 rows of a column that are not all there: what lies beyond K is the zero point of its block.
void pack_short_group(const NBitsArrays& from, const PackedWeight& w, const NBitsStrides& strides, int64_t first_row,
                      int64_t n, int32_t column, uint8_t* chunk) {
    const PackedScheme& s = w.scheme;
    const int32_t start = (int32_t)(first_row % w.chunk_rows);
    for (int32_t k = 0; k < kGroupCodes; k++) {
        const int64_t row = first_row + k, block = row >> w.block_shift;
        const bool real = n >= 0 && row < w.rows;
        const uint32_t code = real ? read_bits(from.codes + n * strides.column_bytes(), row * s.bits, s.bits)
                                   : zero_of(from, s, strides, block, block < strides.blocks ? n : -1);
        put_code(chunk, s.bits, start + k, column, code);
    }
}

// One chunk of a strip, in memory that is zero.
void pack_chunk(const NBitsArrays& from, const PackedWeight& w, const NBitsStrides& strides, int64_t index,
                const StripColumns& real, uint8_t* chunk) {
    const PackedScheme& s = w.scheme;
    const int64_t first_block = index * chunk_blocks(s), first_row = index * w.chunk_rows;
    for (int32_t column = 0; column < kStripColumns; column++) {
        const int64_t n = column < real.count ? real.first + column : -1;
        for (int32_t i = 0; i < chunk_blocks(s); i++) pack_block(from, w, strides, first_block + i, n, column, chunk);
        for (int32_t k = 0; k < w.chunk_rows; k += kGroupCodes) {
            if (n < 0 || first_row + k + kGroupCodes > w.rows)
                pack_short_group(from, w, strides, first_row + k, n, column, chunk);
            else
                pack_group(s.bits, from.codes + n * strides.column_bytes() + (first_row + k) * s.bits / 8, column,
                           chunk + k / kGroupCodes * group_chunk_bytes(s.bits));
        }
    }
}

void unpack_block(const PackedWeight& w, const NBitsStrides& strides, int64_t block, int64_t n, int32_t column,
                  const uint8_t* chunk, const NBitsArrays& to) {
    const PackedScheme& s = w.scheme;
    const int32_t in_chunk = (int32_t)(block % chunk_blocks(s));
    memcpy(to.scales + (n * strides.blocks + block) * strides.scale,
           chunk + w.scales_at + (in_chunk * kStripColumns + column) * strides.scale, (size_t)strides.scale);
    if (s.zero_points)
        or_bits(to.zero_points + n * strides.zero_bytes, block * s.bits,
                (uint32_t)zero_point(w, chunk, in_chunk, column));
}

// One chunk of a strip; zero points go into memory that is zero.
void unpack_chunk(const PackedWeight& w, const NBitsStrides& strides, int64_t index, const StripColumns& real,
                  const uint8_t* chunk, const NBitsArrays& to) {
    const PackedScheme& s = w.scheme;
    const int64_t first_block = index * chunk_blocks(s), first_row = index * w.chunk_rows;
    const int64_t stream_rows = strides.blocks * s.block;
    for (int32_t column = 0; column < real.count; column++) {
        const int64_t n = real.first + column;
        for (int64_t block = first_block; block < first_block + chunk_blocks(s) && block < strides.blocks; block++)
            unpack_block(w, strides, block, n, column, chunk, to);
        for (int32_t k = 0; k < w.chunk_rows && first_row + k < stream_rows; k += kGroupCodes) {
            const int64_t left = stream_rows - first_row - k;
            uint8_t* stream = to.codes + n * strides.column_bytes() + (first_row + k) * s.bits / 8;
            const uint8_t* place = chunk + k / kGroupCodes * group_chunk_bytes(s.bits);
            if (left >= kGroupCodes) {
                unpack_group(s.bits, place, column, stream);
            } else {
                uint8_t whole[kGroupCodes];
                unpack_group(s.bits, place, column, whole);
                memcpy(stream, whole, (size_t)(left * s.bits / 8));
            }
        }
    }
}

}  // namespace

PackedWeight view_packed_weight(const PackedScheme& s, int64_t rows, int64_t columns, ColumnOrder order,
                                const uint8_t* strips) {
    PackedWeight w;
    w.strips = strips;
    w.rows = rows;
    w.columns = columns;
    w.chunk_rows = chunk_rows_of(s);
    w.chunk_bytes = chunk_bytes_of(s);
    w.chunks = (int32_t)((rows + w.chunk_rows - 1) / w.chunk_rows);
    w.padded_rows = (int64_t)w.chunks * w.chunk_rows;
    w.strip_bytes = (int64_t)w.chunks * w.chunk_bytes;
    w.strips_count = strip_count(columns, order);
    w.scales_at = chunk_scales_at(s);
    w.zeros_at = chunk_zeros_at(s);
    w.block_shift = __builtin_ctz((unsigned)s.block);
    w.scheme = s;
    w.order = order;
    return w;
}

PackedHeader packed_header(const PackedWeight& w) {
    PackedHeader header = {};
    memcpy(header.magic, kPackedMagic, sizeof kPackedMagic);
    header.version = kPackedVersion;
    header.header_bytes = sizeof header;
    header.bits = (uint8_t)w.scheme.bits;
    header.scale_type = w.scheme.scale_type;
    header.zero_points = w.scheme.zero_points;
    header.column_order = w.order;
    header.rows = w.rows;
    header.columns = w.columns;
    header.block = (uint32_t)w.scheme.block;
    header.chunk_rows = (uint32_t)w.chunk_rows;
    header.chunk_bytes = (uint32_t)w.chunk_bytes;
    header.strip_columns = kStripColumns;
    header.payload_bytes = w.strip_bytes * w.strips_count;
    return header;
}

int64_t packed_weight_bytes(const PackedScheme& scheme, int64_t rows, int64_t columns, ColumnOrder order) {
    const bool shape = rows >= 1 && columns >= 1 && rows <= kMaxDimension && columns <= kMaxDimension;
    if (!known_scheme(scheme) || !shape || order > kPairedHalves) return -1;
    if (order == kPairedHalves && columns % 2) return -1;
    const int64_t payload = payload_bytes_of(scheme, rows, columns, order);
    return payload == 0 ? -1 : payload + (int64_t)sizeof(PackedHeader);
}

const char* parse_packed_weight(const void* bytes, size_t size, PackedWeight* weight) {
    PackedHeader header;
    if (bytes == nullptr || size < sizeof header) return "the packed weight is shorter than its header";
    memcpy(&header, bytes, sizeof header);
    if (memcmp(header.magic, kPackedMagic, sizeof kPackedMagic) != 0) return "these bytes are not a packed weight";
    if (header.version != kPackedVersion) return "the packed weight has a version that this library does not read";
    if (header.scale_type > kScaleBfloat16) return "the packed weight has an unknown type of scales";
    if (header.zero_points > 1 || header.column_order > kPairedHalves) return "the packed weight has unknown flags";
    constexpr uint8_t kUnused[sizeof header.reserved] = {};
    if (memcmp(header.reserved, kUnused, sizeof kUnused) != 0) return "the packed weight has unknown flags";
    const PackedScheme scheme = {header.bits, (int32_t)header.block, (ScaleType)header.scale_type,
                                 header.zero_points == 1};
    const ColumnOrder order = (ColumnOrder)header.column_order;
    const int64_t expected = packed_weight_bytes(scheme, header.rows, header.columns, order);
    if (expected < 0) return "the packed weight has bits, a block or a shape that cannot be";
    const bool consistent = header.header_bytes == sizeof header && header.strip_columns == kStripColumns &&
                            header.chunk_rows == (uint32_t)chunk_rows_of(scheme) &&
                            header.chunk_bytes == (uint32_t)chunk_bytes_of(scheme) &&
                            header.payload_bytes == expected - (int64_t)sizeof header;
    if (!consistent) return "the sizes in the header of the packed weight contradict each other";
    if ((uint64_t)expected != size) return "the packed weight is not as long as its header says";
    *weight = view_packed_weight(scheme, header.rows, header.columns, order, (const uint8_t*)bytes + sizeof header);
    return nullptr;
}

void pack_weight(const NBitsArrays& from, const PackedScheme& scheme, int64_t rows, int64_t columns, ColumnOrder order,
                 int64_t first_strip, int64_t last_strip, uint8_t* packed) {
    const PackedWeight w = view_packed_weight(scheme, rows, columns, order, packed + sizeof(PackedHeader));
    const NBitsStrides strides(scheme, rows);
    if (first_strip == 0) {
        const PackedHeader header = packed_header(w);
        memcpy(packed, &header, sizeof header);
    }
    for (int64_t strip = first_strip; strip < last_strip; strip++) {
        const StripColumns real = columns_of_strip(w, strip);
        uint8_t* chunk = packed + sizeof(PackedHeader) + strip * w.strip_bytes;
        for (int64_t index = 0; index < w.chunks; index++, chunk += w.chunk_bytes) {
            memset(chunk, 0, (size_t)w.chunk_bytes);
            pack_chunk(from, w, strides, index, real, chunk);
        }
    }
}

void unpack_weight(const PackedWeight& from, int64_t first_strip, int64_t last_strip, const NBitsArrays& to) {
    const NBitsStrides strides(from.scheme, from.rows);
    for (int64_t strip = first_strip; strip < last_strip; strip++) {
        const StripColumns real = columns_of_strip(from, strip);
        if (from.scheme.zero_points)
            memset(to.zero_points + real.first * strides.zero_bytes, 0, (size_t)(real.count * strides.zero_bytes));
        const uint8_t* chunk = from.strips + strip * from.strip_bytes;
        for (int64_t index = 0; index < from.chunks; index++, chunk += from.chunk_bytes)
            unpack_chunk(from, strides, index, real, chunk, to);
    }
}

}  // namespace osl
