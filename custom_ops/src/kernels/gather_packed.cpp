#include "kernels/gather_packed.h"

namespace osl {
namespace {

float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

float float_of_half(uint32_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, size = half & 0x7FFFu;
    if (size >= 0x7C00u) return float_of_bits(sign | 0x7F800000u | size << 13);
    // 2^112 moves the exponent of a half to where a float has it, and makes subnormal halves right, too.
    const float magnitude = float_of_bits(size << 13) * float_of_bits((127u + 112u) << 23);
    return sign ? -magnitude : magnitude;
}

float scale_at(const PackedWeight& w, const uint8_t* chunk, int32_t block, int32_t column) {
    const uint8_t* at = chunk + w.scales_at + (block * kStripColumns + column) * scale_bytes(w.scheme.scale_type);
    if (w.scheme.scale_type == kScaleFloat32) {
        float scale;
        memcpy(&scale, at, sizeof scale);
        return scale;
    }
    uint16_t half;
    memcpy(&half, at, sizeof half);
    return w.scheme.scale_type == kScaleFloat16 ? float_of_half(half) : float_of_bits((uint32_t)half << 16);
}

template <int32_t kBits>
void read(const PackedWeight& w, const uint8_t* strip, int32_t in_strip, float* column) {
    for (int32_t c = 0; c < w.chunks; c++) {
        const uint8_t* chunk = strip + (int64_t)c * w.chunk_bytes;
        const int64_t first = (int64_t)c * w.chunk_rows;
        for (int32_t start = 0; start < w.chunk_rows && first + start < w.rows; start += w.scheme.block) {
            const int32_t block = start / w.scheme.block;
            const int64_t left = w.rows - first - start;
            const int32_t rows = (int32_t)(left < w.scheme.block ? left : w.scheme.block);
            const float scale = scale_at(w, chunk, block, in_strip);
            const int32_t zero = zero_point(w, chunk, block, in_strip);
            float* out = column + first + start;
            for (int32_t k = 0; k < rows; k++) {
                out[k] = (float)((int32_t)read_code(chunk, kBits, start + k, in_strip) - zero) * scale;
            }
        }
    }
}

}  // namespace

void read_column(const PackedWeight& weight, int64_t n, float* column) {
    const uint8_t* strip = weight.strips + n / kStripColumns * weight.strip_bytes;
    const int32_t in_strip = (int32_t)(n % kStripColumns);
    switch (weight.scheme.bits) {
        case 8:
            return read<8>(weight, strip, in_strip, column);
        case 4:
            return read<4>(weight, strip, in_strip, column);
        case 3:
            return read<3>(weight, strip, in_strip, column);
        default:
            return read<2>(weight, strip, in_strip, column);
    }
}

}  // namespace osl
