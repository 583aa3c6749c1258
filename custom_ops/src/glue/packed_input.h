// An initializer that holds a packed weight, checked against the attributes of the node that reads it.
#pragma once

#include "glue/node.h"
#include "packing/sparse_weight.h"

namespace osl::ort {

// The bytes stay where they are: `weight` points into the file that the runtime has mapped.
OrtStatus* read_packed(const Node& node, size_t input, bool shape_in_place, PackedWeight* weight);

// The same for an operator that takes sparse ones, too: `*is_sparse` says which of the two is filled in.
OrtStatus* read_packed_or_sparse(const Node& node, size_t input, bool shape_in_place, PackedWeight* weight,
                                 SparseWeight* sparse, bool* is_sparse);

}  // namespace osl::ort
