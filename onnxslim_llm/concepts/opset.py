"""A newer opset, for what concepts need or become: tried, and left where a node cannot be converted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim_llm.concepts.concept import follow_opset
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.opset import convert_opset

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.passes import Change

__all__ = ["CONCEPT_OPSET", "raise_opset"]

#: The ai.onnx version that the bodies of norms, activations, rotary embeddings and attention are written in.
CONCEPT_OPSET = 18


def raise_opset(model: Model, change: Change, version: int = CONCEPT_OPSET) -> bool:
    """Convert an older model to `version`; nodes are other objects afterwards.

    Args:
        model: The model.
        change: Told why the model stays as it is if it cannot be converted, and otherwise its new opset.
        version: The wanted version of ai.onnx.

    Returns:
        Whether the model has at least that version now.
    """
    if (model.opset() or 0) >= version:
        return True
    attempt = model.copy()  # a conversion that fails leaves half of its work behind
    try:
        convert_opset(attempt, version)
    except ModelError as error:
        change.skip(error.where, f"the model stays at opset {model.opset()}: {error.what}")
        return False
    follow_opset(attempt)
    model.graph = attempt.graph
    model.refresh_names()
    change.detail["opset"] = version
    return True
