"""Opening a model maps its weights: nothing is read, copied or rearranged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from op_models import attributes, needs_library

from onnxslim_llm.custom_ops import ops
from onnxslim_llm.custom_ops.packed import HEADER_BYTES, PackedScheme, header

pytestmark = needs_library

#: 16 weights of 9.4 MB: what is looked at, a page of each and what the kernel reads ahead of it, is small beside it.
SCHEME = PackedScheme(rows=2048, columns=8192, bits=4, block=32)
COUNT = 16
ALIGNMENT = 4096

#: Headers with 64 KB of pages around them (Linux maps those that are in memory anyway), and the library's own code.
LOOKED_AT_MB = COUNT * 0.0625 + 8
PROGRAM = """
import json, sys, time
import numpy, onnxruntime

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")}

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.register_custom_ops_library(sys.argv[1])
# The first session loads what every session needs.
onnxruntime.InferenceSession(sys.argv[3], options, providers=["CPUExecutionProvider"])
before = resident()
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
opened = resident()
result = session.run(None, {"x0": numpy.ones((1, 2048), numpy.float32)})
ran = resident()
print(json.dumps({
    "opened": opened["VmRSS"] - before["VmRSS"], "copied": opened["RssAnon"] - before["RssAnon"],
    "ran": ran["VmRSS"] - before["VmRSS"], "copied_by_run": ran["RssAnon"] - before["RssAnon"],
}))
"""


def save(path: Path, count: int) -> None:
    """`count` products of one input, each with a weight of its own in the data file (zeros, but for the header)."""
    nodes, tensors = [], []
    data = path.with_suffix(".data")
    with data.open("wb") as file:
        for i in range(count):
            offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.seek(offset)
            file.write(header(SCHEME).tobytes())
            file.write(np.full(SCHEME.size - HEADER_BYTES, 0x11, np.uint8).tobytes())
            tensor = TensorProto(name=f"B{i}", data_type=TensorProto.UINT8, dims=[SCHEME.size])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", offset), ("length", SCHEME.size)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            nodes.append(
                helper.make_node("MatMulPacked", ["x0", f"B{i}"], [f"y{i}"], domain=ops.DOMAIN, **attributes(SCHEME))
            )
    inputs = [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["m", SCHEME.rows])]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(count)]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_opening_touches_no_weights(tmp_path: Path) -> None:
    save(tmp_path / "model.onnx", COUNT)
    save(tmp_path / "small.onnx", 1)
    arguments = [str(ops.library_path()), str(tmp_path / "model.onnx"), str(tmp_path / "small.onnx")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    weights = COUNT * SCHEME.size / 2**20
    assert found["opened"] < LOOKED_AT_MB < weights / 10
    assert found["ran"] > weights * 0.9  # else the measurement is wrong
    assert found["copied"] < 2
    assert found["copied_by_run"] < 4
