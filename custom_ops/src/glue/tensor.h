// Tensors of a running node, and their shapes.
#pragma once

#include "glue/status.h"

namespace osl::ort {

constexpr size_t kMaxRank = 8;

struct Shape {
    int64_t dims[kMaxRank];
    size_t rank = 0;

    int64_t operator[](size_t axis) const { return dims[axis]; }
    int64_t last() const { return dims[rank - 1]; }
    bool is(int64_t a) const { return rank == 1 && dims[0] == a; }
    bool is(int64_t a, int64_t b) const { return rank == 2 && dims[0] == a && dims[1] == b; }
    bool operator==(const Shape& other) const {
        if (rank != other.rank) return false;
        for (size_t i = 0; i < rank; i++) {
            if (dims[i] != other.dims[i]) return false;
        }
        return true;
    }
    // Product of the first `count` dimensions, -1 where it is no int64.
    int64_t product(size_t count) const {
        int64_t total = 1;
        for (size_t i = 0; i < count; i++) {
            if (dims[i] < 0 || __builtin_mul_overflow(total, dims[i], &total)) return -1;
        }
        return total;
    }
};

struct Tensor {
    const void* data = nullptr;  // null: an optional input that is not there
    int32_t type = kUndefined;
    Shape shape;
};

// "2 x 3 x 64", for messages.
struct ShapeText {
    char text[160];
    explicit ShapeText(const Shape& shape) {
        size_t used = 0;
        text[0] = 0;
        for (size_t i = 0; i < shape.rank && used < sizeof(text); i++) {
            used += snprintf(text + used, sizeof(text) - used, i ? " x %lld" : "%lld", (long long)shape.dims[i]);
        }
        if (shape.rank == 0) snprintf(text, sizeof(text), "no dimension");
    }
};

// `shape_in_place`: the runtime has GetTensorElementTypeAndShapeData (1.24); older ones copy the shape to the heap.
OrtStatus* read_tensor(const OrtApi* api, bool shape_in_place, const OrtValue* value, Tensor* tensor);
OrtStatus* read_input(const OrtApi* api, bool shape_in_place, const OrtKernelContext* context, size_t index,
                      Tensor* tensor);
OrtStatus* make_output(const OrtApi* api, OrtKernelContext* context, const Shape& shape, void** data);

}  // namespace osl::ort
