// An initializer that holds a packed weight, checked against the attributes of the node that reads it.
#pragma once

#include "glue/node.h"
#include "packing/packed_weight.h"

namespace osl::ort {

// The bytes stay where they are: `weight` points into the file that the runtime has mapped.
OrtStatus* read_packed(const Node& node, size_t input, bool shape_in_place, PackedWeight* weight);

}  // namespace osl::ort
