"""ONNX Runtime's two ways through GroupQueryAttention: tiled ("flash", its default) and with all scores in memory.

    python benchmarks/end_to_end/attention.py

Processor time of one node with float32 operands and a cache that is extended in place, least of several runs. The
choice is read from the environment when a session is opened.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
CASES = ((32, 8, 64, 256), (32, 8, 64, 1024), (16, 8, 128, 256), (16, 8, 128, 1024))
"""Heads, heads of the cache, their size, tokens of a first prompt."""


def node_seconds(heads: int, kv_heads: int, size: int, tokens: int, flash: bool, repeats: int) -> float:
    """Processor seconds of a prompt of `tokens` tokens."""
    os.environ[SWITCH] = "0" if flash else "1"
    shapes: dict[str, list[str | int]] = {
        "query": [1, "S", heads * size],
        "key": [1, "S", kv_heads * size],
        "value": [1, "S", kv_heads * size],
        "past_key": [1, kv_heads, "C", size],
        "past_value": [1, kv_heads, "C", size],
    }
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    inputs.append(helper.make_tensor_value_info("last_index", TensorProto.INT32, [1]))
    inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "key_out", "value_out")]
    node = helper.make_node(
        "GroupQueryAttention",
        [value.name for value in inputs],
        [value.name for value in outputs],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
    )
    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    values = {
        name: rng.standard_normal([tokens if isinstance(d, str) else d for d in shape], np.float32)
        for name, shape in shapes.items()
    }
    bound = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
    bound["last_index"] = ort.OrtValue.ortvalue_from_numpy(np.array([tokens - 1], np.int32))
    bound["total"] = ort.OrtValue.ortvalue_from_numpy(np.array(tokens, np.int32))
    binding = session.io_binding()
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    binding.bind_ortvalue_output("key_out", bound["past_key"])
    binding.bind_ortvalue_output("value_out", bound["past_value"])
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        session.run_with_iobinding(binding)
        taken.append(time.process_time() - start)
    return min(taken)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print("| heads | size | tokens | tiled, ms | all scores, ms |\n|---:|---:|---:|---:|---:|")
    for heads, kv_heads, size, tokens in CASES:
        tiled, whole = (node_seconds(heads, kv_heads, size, tokens, flash, repeats) for flash in (True, False))
        print(f"| {heads} / {kv_heads} | {size} | {tokens} | {1e3 * tiled:.1f} | {1e3 * whole:.1f} |")


if __name__ == "__main__":
    main()
