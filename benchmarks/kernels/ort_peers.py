"""ONNX Runtime's own products: one session with as many weights as it takes to leave every cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
Clock = Callable[[], float]
Node = onnx.NodeProto


def _distinct(weights: dict[str, Array], index: int) -> dict[str, Array]:
    """Marks weights with the number of their product: ONNX Runtime merges products of equal weights."""
    for array in weights.values():
        array.reshape(-1)[0] = index % 100 + 1
        array.reshape(-1)[1] = index // 100
    return weights


def _nbits(index: int, k: int, n: int, block: int, level: int) -> tuple[list[Node], dict[str, Array]]:
    rng = np.random.default_rng(0)
    blocks = -(-k // block)
    weights = {
        f"codes{index}": rng.integers(0, 256, (n, blocks, block // 2), dtype=np.uint8),
        f"scales{index}": (0.005 + 0.01 * rng.random((n, blocks))).astype(np.float32).reshape(-1),
    }
    attributes = {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": level}
    inputs = ["x", *weights]
    return [helper.make_node("MatMulNBits", inputs, [f"y{index}"], domain="com.microsoft", **attributes)], _distinct(
        weights, index
    )


def _dynamic_int8(index: int, k: int, n: int) -> tuple[list[Node], dict[str, Array]]:
    rng = np.random.default_rng(0)
    weights = {
        f"codes{index}": rng.integers(-127, 128, (k, n), dtype=np.int8),
        f"scale{index}": np.full(n, 1e-3, np.float32),
        f"zero{index}": np.zeros(n, np.int8),
    }
    inputs = ["x", f"codes{index}", f"scale{index}", f"zero{index}"]
    return [helper.make_node("DynamicQuantizeMatMul", inputs, [f"y{index}"], domain="com.microsoft")], _distinct(
        weights, index
    )


def _float32(index: int, k: int, n: int) -> tuple[list[Node], dict[str, Array]]:
    weight = np.random.default_rng(0).standard_normal((k, n), np.float32)
    return [helper.make_node("MatMul", ["x", f"w{index}"], [f"y{index}"])], _distinct({f"w{index}": weight}, index)


PEERS = {
    "ort_nbits4_b32": (0.625, lambda i, k, n: _nbits(i, k, n, 32, 4)),
    "ort_nbits0_b32": (0.625, lambda i, k, n: _nbits(i, k, n, 32, 0)),
    "ort_nbits4_b128": (0.53, lambda i, k, n: _nbits(i, k, n, 128, 4)),
    "ort_nbits0_b128": (0.53, lambda i, k, n: _nbits(i, k, n, 128, 0)),
    "ort_dynamic_int8": (1.0, _dynamic_int8),
    "ort_float32": (4.0, _float32),
}
"""Bytes of a weight, and what makes the nodes and weights of product number i."""


class OrtPeer:
    """One of ONNX Runtime's ways, ``copies`` products of the same activations in a session."""

    def __init__(self, name: str, k: int, n: int, rows: int, copies: int, threads: int, clock: Clock) -> None:
        self.copies, self._clock = copies, clock
        make = PEERS[name][1]
        nodes: list[Node] = []
        # Only a corner of each result leaves the graph, so that results share one buffer as they do in a real model.
        constants: dict[str, Array] = {"zeros": np.zeros(2, np.int64), "ones": np.ones(2, np.int64)}
        for i in range(copies):
            products, weights = make(i, k, n)
            corner = helper.make_node("Slice", [f"y{i}", "zeros", "ones"], [f"corner{i}"])
            nodes += [*products, corner]
            constants.update(weights)
        graph = helper.make_graph(
            nodes,
            "peer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, k])],
            [helper.make_tensor_value_info(f"corner{i}", TensorProto.FLOAT, [1, 1]) for i in range(copies)],
            [numpy_helper.from_array(value, key) for key, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # at the end of a run: others are next
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._x = np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32)

    def seconds(self) -> float:
        """Of one product."""
        start = self._clock()
        self._session.run(None, {"x": self._x})
        return (self._clock() - start) / self.copies
