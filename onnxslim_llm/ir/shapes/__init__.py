"""Shapes and small integer contents, as numbers and as expressions of the input sizes."""

from __future__ import annotations

from onnxslim_llm.ir.shapes.inference import SymbolicValues, ensure_shapes, infer_shapes, shape_of

__all__ = [
    "SymbolicValues",
    "ensure_shapes",
    "infer_shapes",
    "shape_of",
]
