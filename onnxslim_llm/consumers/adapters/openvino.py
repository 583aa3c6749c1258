"""OpenVINO's ONNX front end and CPU plug-in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openvino

from onnxslim_llm.consumers.refusal import RefusalError, find_unsupported

_NO_OPERATOR = (r"OpenVINO does not support the following ONNX operations: ([^\n]*)", r"No translator found for: (\S+)")


def run(model: Path, feeds: Mapping[str, Any], folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the results by name.

    Raises:
        RefusalError: The front end lacks operators.
    """
    core = openvino.Core()
    try:
        read = core.read_model(model)
    except Exception as error:
        lacking = [name.strip() for text in find_unsupported(str(error), _NO_OPERATOR) for name in text.split(",")]
        if lacking:
            raise RefusalError(f"OpenVINO has no {', '.join(lacking)}", lacking) from error
        raise
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    taken = {port.any_name: feeds[port.any_name] for port in compiled.inputs}
    results = compiled(taken)
    return {name: results[name] for name in outputs}
