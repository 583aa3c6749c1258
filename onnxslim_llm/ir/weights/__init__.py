"""What constants hold: weights that say their type and size for free and give their content only when asked."""

from __future__ import annotations

from onnxslim_llm.ir.weights.kinds import (
    AliasWeight,
    ArrayWeight,
    ConcatWeight,
    DerivedWeight,
    MappedFile,
    MappedWeight,
    ProtoWeight,
    SparseWeight,
    ViewWeight,
    Weight,
    constant,
    weight_of,
)

__all__ = [
    "AliasWeight",
    "ArrayWeight",
    "ConcatWeight",
    "DerivedWeight",
    "MappedFile",
    "MappedWeight",
    "ProtoWeight",
    "SparseWeight",
    "ViewWeight",
    "Weight",
    "constant",
    "weight_of",
]
