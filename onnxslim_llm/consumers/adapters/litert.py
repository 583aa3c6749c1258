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
    # A file's tensors are called Identity or PartitionedCall:0; its signature has the model's own names.
    signature = interpreter.get_signature_runner()
    taken = {name: feeds[name].astype(detail["dtype"]) for name, detail in signature.get_input_details().items()}
    results = signature(**taken)
    return {name: np.array(results[name]) for name in outputs}
