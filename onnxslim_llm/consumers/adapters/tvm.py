"""TVM: imported by its Relax front end, compiled with LLVM, run in its virtual machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from onnxslim_llm.consumers.refusal import RefusalError, find_unsupported

_NO_OPERATOR = (r"not supported[^:]*: *\{?'?(\w+)",)


def run(model: Path, feeds: Mapping[str, Any], folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the results by name.

    Raises:
        RefusalError: The front end lacks operators.
    """
    proto = onnx.load(model)
    names = [value.name for value in proto.graph.input if value.name in feeds]
    try:
        module = from_onnx(proto, keep_params_in_input=False)
    except Exception as error:
        lacking = find_unsupported(str(error), _NO_OPERATOR)
        if lacking:
            raise RefusalError(f"TVM has no {', '.join(lacking)}", lacking) from error
        raise
    executable = relax.build(module, target="llvm")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    results = machine["main"](*(tvm.runtime.tensor(np.ascontiguousarray(feeds[name])) for name in names))
    order = [value.name for value in proto.graph.output]
    listed = [results] if len(order) == 1 else list(results)
    return {name: listed[order.index(name)].numpy() for name in outputs}
