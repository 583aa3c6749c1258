"""Outputs whose declared shape is not the one that their nodes give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim_llm.ir.shapes.inference import infer_shapes

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["contradictions"]


def contradictions(model: Model) -> dict[str, str]:
    """Return what is wrong with the declared shape of each output that has another one, by the output's name.

    ONNX Runtime does not mind; programs that make room for outputs by what is declared do.
    """
    infer_shapes(model)
    found = {}
    for tensor in model.graph.outputs:
        derived = tensor.__dict__.get("derived_shape")
        if derived is None or tensor.shape is None:
            continue
        pairs = list(zip(tensor.shape, derived, strict=False))
        wrong = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        if wrong or len(tensor.shape) != len(derived):
            found[tensor.name] = f"output '{tensor.name}' is declared as {list(tensor.shape)}, and is {list(derived)}"
    return found
