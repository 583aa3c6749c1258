"""LiteRT: converted by onnx2tf, run by its interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx2tf

from onnxslim_llm.consumers.refusal import RefusalError, find_unsupported

_NO_OPERATOR = (r"(\w+) OP is not yet implemented", r"Unsupported ONNX op[^\w]*(\w+)")


def run(model: Path, feeds: Mapping[str, Any], folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the results by name.

    Raises:
        RefusalError: The converter lacks operators.
    """
    from ai_edge_litert.interpreter import Interpreter

    proto = onnx.load(model)
    names = [value.name for value in proto.graph.input if value.name in feeds]
    whole, written = folder / "model.onnx", folder / "tf"
    onnx.save(proto, whole)
    try:
        onnx2tf.convert(
            input_onnx_file_path=str(whole),
            output_folder_path=str(written),
            keep_shape_absolutely_input_names=names,
            copy_onnx_input_output_names_to_tflite=True,
            not_use_onnxsim=True,
            non_verbose=True,
        )
    except (Exception, SystemExit) as error:
        raise RefusalError(f"onnx2tf: {str(error)[:200]}", find_unsupported(str(error), _NO_OPERATOR)) from error
    interpreter = Interpreter(model_path=str(written / "model_float32.tflite"))
    interpreter.allocate_tensors()
    for detail in interpreter.get_input_details():
        name = _named(detail["name"], names)
        interpreter.set_tensor(detail["index"], feeds[name].astype(detail["dtype"]).reshape(detail["shape"]))
    interpreter.invoke()
    found = {
        detail["name"]: np.array(interpreter.get_tensor(detail["index"])) for detail in interpreter.get_output_details()
    }
    if len(outputs) == 1 and len(found) == 1:
        return {outputs[0]: next(iter(found.values()))}
    return {name: found[_named(name, list(found))] for name in outputs}


def _named(name: str, among: Sequence[str]) -> str:
    """Signatures add a prefix or a number to names."""
    plain = name.replace("serving_default_", "").split(":")[0]
    return next((other for other in among if other == plain or other.split(":")[0] == plain), among[0])
