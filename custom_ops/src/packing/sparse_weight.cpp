#include "packing/sparse_weight.h"

namespace osl {
namespace {

constexpr int64_t kOffsetBytes = sizeof(uint64_t);

int32_t bitmap_bytes(const PackedWeight& w) { return w.chunk_rows / kWordRows * 8; }

int64_t table_bytes(const PackedWeight& w) { return (w.strips_count + 1) * kOffsetBytes; }

bool has_sparse_form(const PackedScheme& scheme) { return scheme.bits == 4 || scheme.bits == 8; }

// Stored codes by the nibbles that they lie in; all are low where a code takes a byte.
struct Values {
    int64_t low, high;
    int64_t count() const { return low + high; }
    int64_t bytes() const { return low > high ? low : high; }
};

void put_offset(uint8_t* payload, int64_t strip, int64_t at) {
    const uint64_t value = (uint64_t)at;
    memcpy(payload + strip * kOffsetBytes, &value, sizeof value);
}

SparseWeight view_of(const PackedWeight& packed) {
    SparseWeight s = {};
    s.packed = packed;
    s.packed.strips = nullptr;
    s.scales_at = bitmap_bytes(packed);
    s.zeros_at = s.scales_at + packed.zeros_at - packed.scales_at;
    s.values_at = s.scales_at + packed.chunk_bytes - packed.scales_at;
    return s;
}

// The codes of a chunk that are stored, to `chunk` where that is not null.
Values make_chunk(const SparseWeight& s, const uint8_t* from, uint8_t* chunk) {
    const PackedWeight& w = s.packed;
    Values values = {};
    for (int32_t word = 0; word < w.chunk_rows / kWordRows; word++) {
        const bool high = in_high_nibbles(w.scheme.bits, word);
        int64_t& count = high ? values.high : values.low;
        uint64_t present = 0;
        for (int32_t place = 0; place < 64; place++) {
            const int32_t k = word * kWordRows + place % 4, column = place / 4;
            const uint32_t code = read_code(from, w.scheme.bits, k, column);
            if (code == (uint32_t)zero_point(w, from, k >> w.block_shift, column)) continue;
            present |= uint64_t{1} << place;
            if (chunk != nullptr) chunk[s.values_at + count] |= (uint8_t)(code << (high ? 4 : 0));
            count++;
        }
        if (chunk != nullptr) memcpy(chunk + word * 8, &present, sizeof present);
    }
    return values;
}

const uint8_t* packed_chunk(const PackedWeight& w, int64_t strip, int32_t chunk) {
    return w.strips + strip * w.strip_bytes + (int64_t)chunk * w.chunk_bytes;
}

// Follows the chunks of a strip from `at` to `end`, which they must meet. Returns the values in them, or -1.
int64_t walk_strip(const SparseWeight& s, int64_t at, int64_t end) {
    int64_t values = 0;
    for (int32_t chunk = 0; chunk < s.packed.chunks; chunk++) {
        if (end - at < s.values_at) return -1;
        Values here = {};
        for (int32_t word = 0; word * 8 < s.scales_at; word++)
            (in_high_nibbles(s.packed.scheme.bits, word) ? here.high : here.low) +=
                __builtin_popcountll(bitmap_word(s.payload + at, word));
        at += s.values_at;
        if (end - at < here.bytes()) return -1;
        at += here.bytes();
        values += here.count();
    }
    return at == end ? values : -1;
}

const char* check_strips(SparseWeight* s) {
    const int64_t strips = s->packed.strips_count, end = s->payload_bytes - kSparseTail;
    if (end / kOffsetBytes < strips + 1) return "the sparse packed weight is not as long as its header says";
    constexpr const char* kWrong = "the strips of the sparse packed weight do not end where its table says";
    if (s->strip_at(0) != table_bytes(s->packed) || s->strip_at(strips) != end) return kWrong;
    for (int64_t strip = 0; strip < strips; strip++) {
        const int64_t first = s->strip_at(strip), last = s->strip_at(strip + 1);
        if (first < 0 || last < first || last > end) return kWrong;
        const int64_t values = walk_strip(*s, first, last);
        if (values < 0) return kWrong;
        s->values += values;
    }
    return nullptr;
}

}  // namespace

bool has_sparse_magic(const void* bytes, size_t size) {
    return bytes != nullptr && size >= sizeof kSparseMagic && memcmp(bytes, kSparseMagic, sizeof kSparseMagic) == 0;
}

const char* parse_sparse_weight(const void* bytes, size_t size, SparseWeight* weight) {
    PackedHeader header;
    if (bytes == nullptr || size < sizeof header) return "the sparse packed weight is shorter than its header";
    memcpy(&header, bytes, sizeof header);
    if (!has_sparse_magic(bytes, size)) return "these bytes are not a sparse packed weight";
    if (header.version != kSparseVersion)
        return "the sparse packed weight has a version that this library does not read";
    if (header.scale_type > kScaleBfloat16 || header.zero_points > 1 || header.column_order > kPairedHalves)
        return "the sparse packed weight has unknown flags";
    const PackedScheme scheme = {header.bits, (int32_t)header.block, (ScaleType)header.scale_type,
                                 header.zero_points == 1};
    const ColumnOrder order = (ColumnOrder)header.column_order;
    if (!has_sparse_form(scheme) || packed_weight_bytes(scheme, header.rows, header.columns, order) < 0)
        return "the sparse packed weight has bits, a block or a shape that cannot be";
    SparseWeight s = view_of(view_packed_weight(scheme, header.rows, header.columns, order, nullptr));
    PackedHeader expected = packed_header(s.packed);
    memcpy(expected.magic, kSparseMagic, sizeof kSparseMagic);
    expected.version = kSparseVersion;
    expected.chunk_bytes = (uint32_t)s.values_at;
    expected.payload_bytes = header.payload_bytes;
    if (memcmp(&header, &expected, sizeof header) != 0)
        return "the sizes in the header of the sparse packed weight contradict each other";
    if (header.payload_bytes < kSparseTail || (uint64_t)header.payload_bytes != size - sizeof header)
        return "the sparse packed weight is not as long as its header says";
    s.payload = (const uint8_t*)bytes + sizeof header;
    s.payload_bytes = header.payload_bytes;
    if (const char* error = check_strips(&s)) return error;
    *weight = s;
    return nullptr;
}

int64_t sparse_weight_bytes(const PackedWeight& weight) {
    if (!has_sparse_form(weight.scheme)) return -1;
    const SparseWeight s = view_of(weight);
    int64_t bytes = (int64_t)sizeof(PackedHeader) + table_bytes(weight) + kSparseTail;
    for (int64_t strip = 0; strip < weight.strips_count; strip++)
        for (int32_t chunk = 0; chunk < weight.chunks; chunk++)
            bytes += s.values_at + make_chunk(s, packed_chunk(weight, strip, chunk), nullptr).bytes();
    return bytes;
}

void make_sparse(const PackedWeight& weight, int64_t bytes, uint8_t* sparse) {
    const SparseWeight s = view_of(weight);
    memset(sparse, 0, (size_t)bytes);
    PackedHeader header = packed_header(weight);
    memcpy(header.magic, kSparseMagic, sizeof kSparseMagic);
    header.version = kSparseVersion;
    header.chunk_bytes = (uint32_t)s.values_at;
    header.payload_bytes = bytes - (int64_t)sizeof header;
    memcpy(sparse, &header, sizeof header);
    uint8_t* payload = sparse + sizeof header;
    int64_t at = table_bytes(weight);
    for (int64_t strip = 0; strip < weight.strips_count; strip++) {
        put_offset(payload, strip, at);
        for (int32_t chunk = 0; chunk < weight.chunks; chunk++) {
            const uint8_t* from = packed_chunk(weight, strip, chunk);
            memcpy(payload + at + s.scales_at, from + weight.scales_at, (size_t)(s.values_at - s.scales_at));
            at += s.values_at + make_chunk(s, from, payload + at).bytes();
        }
    }
    put_offset(payload, weight.strips_count, at);
}

}  // namespace osl
