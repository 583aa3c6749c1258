"""A newer opset for the sake of its operators: tried, and left where a node cannot be converted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim_llm.concepts.concept import follow_opset
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.opset import convert_opset

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.passes import Change

__all__ = ["raise_opset"]


def raise_opset(model: Model, version: int, change: Change) -> None:
    """Convert an older model to `version`; `change` is told why it stays as it is if that is impossible.

    Nodes are other objects afterwards.
    """
    if (model.opset() or 0) >= version:
        return
    attempt = model.copy()  # a conversion that fails leaves half of its work behind
    try:
        convert_opset(attempt, version)
    except ModelError as error:
        change.skip(error.where, f"the model stays at opset {model.opset()}: {error.what}")
        return
    follow_opset(attempt)
    model.graph = attempt.graph
    model.refresh_names()
    change.detail["opset"] = version
