"""MNN: converted by MNNConvert, run on the CPU.

The converter is called as MNN's extension module, never by the script `mnnconvert`: with its first call that script
installs a package for sending logs into the environment, and then sends the sizes of models and a machine's identity.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import MNN
import numpy as np

from onnxslim_llm.consumers.refusal import RefusalError, find_unsupported

_NO_OPERATOR = (
    r"[Nn]ot [Ss]upport(?:ed)?(?: onnx)? ?[Oo]p(?:eration)?[^:\n]*: ?\[?\s*([\w.]+)",
    r"Don't support (\w+)",
)


def run(model: Path, feeds: Mapping[str, Any], folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the results by name.

    Raises:
        RefusalError: The converter lacks operators, or writes nothing.
    """
    converted = folder / "model.mnn"
    arguments = ["-f", "ONNX", "--modelFile", model, "--MNNModel", converted, "--bizCode", "check"]
    call = f"import _tools; _tools.mnnconvert({['mnnconvert', *map(str, arguments)]!r})"
    done = subprocess.run([sys.executable, "-c", f"import MNN; {call}"], capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    sys.stdout.write(log)
    lacking = find_unsupported(log, _NO_OPERATOR)
    if not converted.is_file() or lacking:
        raise RefusalError(f"MNNConvert failed with exit code {done.returncode}: {_cause(log)}", lacking)
    names = list(_inputs(model, feeds))
    module = MNN.nn.load_module_from_file(str(converted), names, list(outputs))
    variables = [_variable(feeds[name]) for name in names]
    results = module.forward(variables)
    results = results if isinstance(results, list | tuple) else [results]
    return {name: np.array(MNN.expr.convert(r, MNN.expr.NCHW).read()) for name, r in zip(outputs, results, strict=True)}


def _inputs(model: Path, feeds: Mapping[str, Any]) -> list[str]:
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    return [value.name for value in graph.input if value.name in feeds]


def _variable(array: Any) -> Any:
    narrow = array.astype(np.int32) if array.dtype == np.int64 else array  # MNN has no int64
    kind = MNN.expr.int if narrow.dtype == np.int32 else MNN.expr.float
    return MNN.expr.const(narrow.copy(), list(narrow.shape), MNN.expr.NCHW, kind)


def _cause(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if "rror" in line or "upport" in line]
    return lines[0][:200] if lines else "it said nothing"
