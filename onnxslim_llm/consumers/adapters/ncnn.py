"""ncnn: converted by pnnx, run on the CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ncnn
import numpy as np
import onnx

from onnxslim_llm.consumers.refusal import RefusalError, find_unsupported

_NO_OPERATOR = (r"layer (\S+) not exists or registered", r"ignore (\S+) \S+ param", r"unsupported op (\S+)")
_TYPES = {"int64": "i64", "int32": "i32", "float32": "f32", "float16": "f16", "bool": "bool"}


def run(model: Path, feeds: Mapping[str, Any], folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the results by name.

    Raises:
        RefusalError: The converter lacks operators, or writes nothing.
    """
    proto = onnx.load(model)
    inputs = [value.name for value in proto.graph.input if value.name in feeds]
    whole = folder / "model.onnx"  # pnnx reads no external data
    onnx.save(proto, whole)
    shapes = ",".join(f"[{','.join(map(str, feeds[n].shape))}]{_TYPES[str(feeds[n].dtype)]}" for n in inputs)
    command = [Path(sys.executable).parent / "pnnx", whole, f"inputshape={shapes}", "fp16=0", "optlevel=2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, check=False)
    log = done.stdout + done.stderr
    sys.stdout.write(log)
    structure, weights = folder / "model.ncnn.param", folder / "model.ncnn.bin"
    if not structure.is_file():
        raise RefusalError(f"pnnx failed with exit code {done.returncode}", find_unsupported(log, _NO_OPERATOR))
    foreign = _foreign_layers(structure)
    if foreign:
        raise RefusalError(f"ncnn has no {', '.join(foreign)}", foreign)
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = net.opt.use_vulkan_compute = False
    if net.load_param(str(structure)) or net.load_model(str(weights)):
        raise RefusalError("ncnn cannot load what pnnx wrote")
    kept = []
    with net.create_extractor() as extractor:
        for i, name in enumerate(inputs):
            kept.append(_mat(feeds[name]))
            extractor.input(f"in{i}", kept[-1])
        order = [value.name for value in proto.graph.output]
        results = {}
        for name in outputs:
            code, result = extractor.extract(f"out{order.index(name)}")
            if code:
                raise RefusalError(f"ncnn fails with code {code} at output '{name}'")
            results[name] = np.array(result)
        return results


def _mat(array: Any) -> Any:
    """Ncnn has no batches: a first axis of 1 goes; integers are 32 bits in the memory of floats."""
    narrow = array.astype(np.int32) if array.dtype.kind in "iub" else array.astype(np.float32)
    narrow = narrow[0] if narrow.ndim > 1 and narrow.shape[0] == 1 else narrow
    return ncnn.Mat(np.ascontiguousarray(narrow)).clone()


def _foreign_layers(structure: Path) -> list[str]:
    """Return the layer types that pnnx wrote down without a form of ncnn: their names have a dot."""
    kinds = [line.split()[0] for line in structure.read_text().splitlines()[2:] if line.split()]
    return list(dict.fromkeys(kind for kind in kinds if re.search(r"[.:]", kind)))
