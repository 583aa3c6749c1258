#include "glue/packed_input.h"

namespace osl::ort {
namespace {

OrtStatus* read(const Node& node, size_t input, bool shape_in_place, PackedWeight* weight, SparseWeight* sparse) {
    constexpr int64_t kLargestSide = int64_t{1} << 40;
    int64_t k = 0, n = 0, bits = 0, block = 0;
    OSL_RETURN_IF_FAILED(node.integer("K", 1, kLargestSide, &k));
    OSL_RETURN_IF_FAILED(node.integer("N", 1, kLargestSide, &n));
    OSL_RETURN_IF_FAILED(node.integer("bits", 2, 8, &bits));
    OSL_RETURN_IF_FAILED(node.integer("block_size", 16, 256, &block));
    Tensor bytes;
    OSL_RETURN_IF_FAILED(node.constant(input, "the packed weight", shape_in_place, &bytes));
    if (bytes.type != kUint8 || bytes.shape.rank != 1) {
        return node.fail(kInvalidGraph, "the packed weight must be uint8 [bytes], not [%s] of type %d",
                         ShapeText(bytes.shape).text, (int)bytes.type);
    }
    const size_t size = (size_t)bytes.shape[0];
    const bool is_sparse = sparse != nullptr && has_sparse_magic(bytes.data, size);
    const char* error =
        is_sparse ? parse_sparse_weight(bytes.data, size, sparse) : parse_packed_weight(bytes.data, size, weight);
    if (error != nullptr) {
        return node.fail(kInvalidGraph, "the packed weight of %lld bytes is not usable: %s", (long long)bytes.shape[0],
                         error);
    }
    if (is_sparse) *weight = sparse->packed;
    if (weight->rows != k || weight->columns != n || weight->scheme.bits != bits || weight->scheme.block != block) {
        return node.fail(kInvalidGraph,
                         "the packed weight has K, N, bits, block_size %lld, %lld, %d, %d; the node %lld, "
                         "%lld, %lld, %lld",
                         (long long)weight->rows, (long long)weight->columns, (int)weight->scheme.bits,
                         (int)weight->scheme.block, (long long)k, (long long)n, (long long)bits, (long long)block);
    }
    return nullptr;
}

}  // namespace

OrtStatus* read_packed(const Node& node, size_t input, bool shape_in_place, PackedWeight* weight) {
    return read(node, input, shape_in_place, weight, nullptr);
}

OrtStatus* read_packed_or_sparse(const Node& node, size_t input, bool shape_in_place, PackedWeight* weight,
                                 SparseWeight* sparse, bool* is_sparse) {
    OSL_RETURN_IF_FAILED(read(node, input, shape_in_place, weight, sparse));
    *is_sparse = weight->strips == nullptr;
    return nullptr;
}

}  // namespace osl::ort
