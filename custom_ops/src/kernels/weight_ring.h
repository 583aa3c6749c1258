// A block of the weight as a stream of dequantized steps (32 rows of K by two strips) through a ring of memory that
// stays in the first-level cache. Steps are made while earlier ones are multiplied.
#pragma once

#include <type_traits>

#include "kernels/amx_decode.h"

namespace osl {
namespace OSL_ISA {

constexpr int32_t kStepBytes = 2 * kTileBytes;

// The panels of a block in the order in which they are multiplied: `depth` rows of K by one or two strips.
struct PanelWalk {
    const PackedWeight* weight;
    int64_t depth;
    int64_t first, last;  // strips of the block
    int64_t strip, k;

    bool done() const { return k >= weight->padded_rows; }
    int32_t strips() const { return last - strip > 1 ? 2 : 1; }
    int32_t steps() const {
        const int64_t left = weight->padded_rows - k;
        return (int32_t)((left < depth ? left : depth) / kTileK);
    }
    const uint8_t* bytes() const {
        return weight->strips + strip * weight->strip_bytes + k / weight->chunk_rows * weight->chunk_bytes;
    }
    void advance() {
        strip += 2;
        if (strip < last) return;
        strip = first;
        k += depth;
    }
};

// A tile that is being made.
template <CodeFormat kFormat>
class TileInWork {
public:
    TileInWork(const PackedWeight& w, const uint8_t* chunk, int32_t half, uint8_t* tile)
        : codes_(chunk + half * 256), tile_(tile) {
        const int32_t block = (half * kDotRows) >> w.block_shift;
        if constexpr (kFormat == kOtherBits)
            decode_tile_any(w, chunk, half, tile);
        else if constexpr (kFormat == kOther4Bit)
            affines_of(w, chunk, half, affines_);
        else
            affines_[0] = affine_from((__m512)widen_float16(chunk + w.scales_at + block * kStripColumns * 2));
    }
    void quarter(int32_t j) const {
        if (kFormat != kOtherBits) decode_quarter(codes_, j, affines_[0], affines_[kFormat == kOther4Bit], tile_);
    }

private:
    const uint8_t* codes_;
    uint8_t* tile_;
    Affine affines_[kFormat == kOther4Bit ? 2 : 1];
};

class WeightRing {
public:
    // `ring`: kRingSteps * kStepBytes.
    template <CodeFormat kFormat>
    WeightRing(std::integral_constant<CodeFormat, kFormat>, const PanelWalk& start, uint8_t* ring)
        : w_(*start.weight),
          half_bytes_(w_.chunk_bytes / (w_.chunk_rows / kDotRows)),
          unit_(w_.strips + start.first * w_.strip_bytes),
          making_(start),
          fetching_(start),
          ring_(ring) {
        enter_panel();
        make_ready<kFormat>(kRingSteps);
        // Fetched is what will be made a panel after what is being made now.
        while (!fetching_.done() && (fetching_.k != making_.k || fetching_.strip != making_.strip)) fetching_.advance();
        fetching_.advance();
    }

    const uint8_t* front() const { return ring_ + front_ * kStepBytes; }
    const uint8_t* after(const uint8_t* step) const {
        return step + kStepBytes == ring_ + kRingSteps * kStepBytes ? ring_ : step + kStepBytes;
    }
    // A step at the front will not be read again: its place can be made use of.
    void release() { spare_ += 2; }
    // The front moves on by `steps`, which have been released.
    void drop(int32_t steps) {
        front_ += steps;
        while (front_ >= kRingSteps) front_ -= kRingSteps;
    }
    // Tiles that there is room for.
    int32_t spare() const { return spare_; }

    // A tile is made by begin_tile(), quarter() 0 to 3 of what that gave, and end_tile(), at leisure.
    template <CodeFormat kFormat>
    TileInWork<kFormat> begin_tile() {
        // What lies beyond the weight is made of the first codes of the unit, and not read.
        const bool exists = strip_ < strips_;
        return {w_, exists ? chunk_ : unit_, exists ? half_ : 0, ring_ + back_};
    }
    void end_tile() {
        spare_--;
        back_ = back_ + kTileBytes == kRingSteps * kStepBytes ? 0 : back_ + kTileBytes;
        chunk_ += w_.strip_bytes;
        if (++strip_ < 2) return;
        strip_ = 0;
        chunk_ -= 2 * w_.strip_bytes;
        if (++half_ * kDotRows == w_.chunk_rows) {
            half_ = 0;
            chunk_ += w_.chunk_bytes;
        }
        if (--left_ > 0) return;
        making_.advance();
        enter_panel();
    }

    // Makes what is missing of the first `steps` steps.
    template <CodeFormat kFormat>
    void make_ready(int32_t steps) {
        if (steps > kRingSteps) steps = kRingSteps;
        while (2 * (kRingSteps - steps) < spare_) {
            const auto tile = begin_tile<kFormat>();
            for (int32_t j = 0; j < 4; j++) tile.quarter(j);
            end_tile();
        }
    }

    // What is made some steps later, to the first-level cache: for panels that are passed once.
    void fetch_near() const {
        constexpr int32_t kAhead = 4 * 576;  // four chunks of block 32, measured
        const char* from = (const char*)chunk_ + half_ * half_bytes_ + kAhead;
        for (int32_t line = 0; line < half_bytes_; line += 64) _mm_prefetch(from + line, _MM_HINT_T0);
    }

    // To the second-level cache: shares the fetching of one panel out among `products` calls of fetch().
    void begin_fetch(int64_t products) {
        products_ = products;
        credit_ = lines_ = 0;
        if (fetching_.done()) return;
        fetched_ = fetching_.bytes();
        other_strip_ = fetching_.strips() > 1 ? w_.strip_bytes : 0;
        lines_ = ((int64_t)fetching_.steps() * kTileK * w_.chunk_bytes / w_.chunk_rows + 63) / 64;
        fetching_.advance();
    }
    void fetch() {
        for (credit_ += lines_; credit_ >= products_; credit_ -= products_, fetched_ += 64) {
            _mm_prefetch((const char*)fetched_, _MM_HINT_T1);
            _mm_prefetch((const char*)fetched_ + other_strip_, _MM_HINT_T1);
        }
    }

private:
    void enter_panel() {
        if (making_.done()) {
            strips_ = 0;  // what is made from here on is not read
            left_ = INT32_MAX;
            chunk_ = unit_;
            return;
        }
        left_ = making_.steps();
        strips_ = making_.strips();
        half_ = (int32_t)(making_.k % w_.chunk_rows) / kDotRows;
        chunk_ = making_.bytes();
    }
    const PackedWeight& w_;
    const int32_t half_bytes_;   // of a strip, for 32 rows of K
    const uint8_t* const unit_;  // its first strip
    PanelWalk making_, fetching_;
    uint8_t* const ring_;
    int32_t front_ = 0, back_ = 0;  // a step, a byte
    int32_t spare_ = 2 * kRingSteps;
    int32_t left_ = 0, half_ = 0, strip_ = 0, strips_ = 0;
    const uint8_t* chunk_ = nullptr;
    const uint8_t* fetched_ = nullptr;
    int64_t other_strip_ = 0, lines_ = 0, products_ = 1, credit_ = 0;
};

}  // namespace OSL_ISA
}  // namespace osl
