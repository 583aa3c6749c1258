"""What a node of the operator library costs beside its work: chains of EmptyNode in one ONNX Runtime session.

    python benchmarks/custom_ops/node_overhead.py

Prints microseconds per node, the median of interleaved rounds, for a node that wakes the session's threads up and one
that does not, on one and two threads. A node of ONNX Runtime's own (Identity on 4 floats, which copies) is beside it,
so that what the executor itself takes can be told apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from onnxslim_llm.custom_ops import ops

LENGTH = 2000  # nodes of a chain
ROUNDS = 31


def chain(op: str, length: int, **attributes: int) -> bytes:
    """A model of `length` nodes, one after the other."""
    domain = ops.DOMAIN if attributes else ""
    nodes = [helper.make_node(op, [f"t{i}"], [f"t{i + 1}"], domain=domain, **attributes) for i in range(length)]
    kind = onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, [1, 4]) for name in ("t0", f"t{length}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    text: bytes = helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    return text


def runner(model: bytes, threads: int) -> Callable[[], float]:
    """A function that runs the model once and returns seconds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    ops.register(options)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {"t0": np.zeros((1, 4), np.float32)}

    def run() -> float:
        start = time.perf_counter()
        session.run(None, feeds)
        return time.perf_counter() - start

    return run


def main() -> None:
    """Measure and print."""
    cases = {"ONNX Runtime's Identity": ("Identity", {}), "EmptyNode": ("EmptyNode", {"parallel": 0})}
    cases["EmptyNode, all threads woken"] = ("EmptyNode", {"parallel": 1})
    for threads in (1, 2):
        runs = {
            name: (runner(chain(op, LENGTH, **attributes), threads), runner(chain(op, 1, **attributes), threads))
            for name, (op, attributes) in cases.items()
        }
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, (long, short) in runs.items():
                samples[name].append((long() - short()) / (LENGTH - 1))
        for name, values in samples.items():
            print(f"{threads} thread(s)  {name:<30} {1e6 * statistics.median(values):7.3f} us/node")


if __name__ == "__main__":
    main()
