"""Notes in the model file for those who run it."""

from __future__ import annotations

import onnx

from onnxslim_llm.ir.model import Model

__all__ = ["IN_PLACE_CACHE", "set_metadata"]

#: Key of the note that each cache input and the output that continues it are one buffer; the value is its kind.
IN_PLACE_CACHE = "onnxslim_llm.kv_cache"


def set_metadata(model: Model, key: str, value: str) -> None:
    """Set an entry of the model's metadata_props."""
    if model.skeleton is None:
        model.skeleton = onnx.ModelProto()
    for entry in model.skeleton.metadata_props:
        if entry.key == key:
            entry.value = value
            return
    model.skeleton.metadata_props.add(key=key, value=value)
