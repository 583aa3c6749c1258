"""Small models with weights worth quantizing, and how tests look at what came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser

from onnxslim_llm.custom_ops.quantize import BlockSpec, quantize_tile
from onnxslim_llm.custom_ops.reference import dequantize
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import PassRecord

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

VOCAB, WIDTH = 96, 64

#: A language model in small: an embedding, a product, and a classifier that shares the embedding's weight.
TIED = f"""
    agraph (int64[b, s] ids) => (float[b, s, {VOCAB}] y) {{
        h = Gather (E, ids)
        n = Tanh (h)
        a = MatMul (n, W)
        r = Add (h, a)
        T = Transpose <perm = [1, 0]> (E)
        y = MatMul (r, T)
    }}
"""

#: One product.
PRODUCT = "agraph (float[m, K] x) => (float[m, N] y) { y = MatMul (x, W) }"


def weights(seed: int = 0, *shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def proto(
    text: str, opset: int = 21, ir_version: int = 10, imports: str = "", **initializers: Array
) -> onnx.ModelProto:
    """A model in ONNX text, with initializers."""
    model = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}{imports}]>\n{text}')
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.SetInParent()  # the text of a scalar says nothing about its shape
    for name, value in initializers.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def product(rows: int, columns: int, text: str = PRODUCT, **more: Any) -> onnx.ModelProto:
    """x[m, K] times W[K, N]."""
    text = text.replace("K]", f"{rows}]").replace("N]", f"{columns}]")
    return proto(text, W=weights(1, rows, columns), **more)


def tied(vocab: int = VOCAB, width: int = WIDTH, dtype: Any = np.float32, opset: int = 21) -> onnx.ModelProto:
    """The model TIED in another size or type."""
    text = TIED.replace(str(VOCAB), str(vocab))
    if dtype == np.float16:
        text = text.replace("float[", "float16[")
    table = weights(2, vocab, width, dtype=dtype) / 2
    return proto(text, opset, E=table, W=weights(3, width, width, dtype=dtype) / 4)


def model_of(source: onnx.ModelProto) -> Model:
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    return from_proto(copy)


def skipped(change: Change | PassRecord) -> dict[str, str]:
    return {skip.where: skip.reason for skip in change.skipped}


def run(model: onnx.ModelProto | Path, feeds: Feeds, *, optimise: bool = False, exact: bool = True) -> Array:
    """The first output in ONNX Runtime; `exact` computes fused products in float32 instead of int8."""
    session = _session(model, optimise, exact, None)
    result: Array = session.run(None, dict(feeds))[0]
    return result


def fused(model: onnx.ModelProto | Path, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs after its optimisations."""
    path = folder / "optimised.onnx"
    _session(model, True, True, path)
    return Counter(node.op_type for node in _all_nodes(onnx.load(path, load_external_data=False).graph))


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [*graph.node, *(node for g in inner for node in _all_nodes(g))]


def _session(model: Any, optimise: bool, exact: bool, save_to: Path | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def rounded(weight: Array, bits: int, block: int, symmetric: bool, scale_dtype: str = "float32") -> Array:
    """What is left of W[K, N] after quantizing: the specification's own dequantization."""
    spec = BlockSpec(bits, block or -1, symmetric, scale_dtype)  # type: ignore[arg-type]
    return dequantize(quantize_tile(weight, spec, "search").buffers)


def with_weight(source: onnx.ModelProto, name: str, value: Array) -> onnx.ModelProto:
    """A copy of a model with another value for an initializer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(numpy_helper.to_array(tensor).dtype), name))
    return copy
