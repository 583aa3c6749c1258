"""Models of one node of the operator library, made by hand so that a test can make them wrong, too."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.custom_ops import ops, packed
from onnxslim_llm.custom_ops.packed import PackedScheme

Array = np.ndarray[Any, Any]

needs_library = pytest.mark.skipif(ops.library_path() is None, reason="the operator library was not built here")

TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.uint8): TensorProto.UINT8,
}


def packed_weight(scheme: PackedScheme, seed: int = 0) -> Array:
    """Random codes, scales around 2^-5 and zero points."""
    rng = np.random.default_rng(seed)
    blocks = -(-scheme.rows // scheme.block)
    codes = rng.integers(0, 256, (scheme.columns, blocks, scheme.block * scheme.bits // 8), np.uint8)
    scales = (rng.standard_normal((scheme.columns, blocks)) / 32).astype(scheme.scale_dtype)
    zeros = None
    if not scheme.symmetric:
        zeros = rng.integers(0, 256, (scheme.columns, -(-blocks * scheme.bits // 8)), np.uint8)
    return packed.pack(scheme, codes, scales, zeros)


def attributes(scheme: PackedScheme, **more: Any) -> dict[str, Any]:
    return {"K": scheme.rows, "N": scheme.columns, "bits": scheme.bits, "block_size": scheme.block, **more}


def model(
    op: str, given: dict[str, Array], constants: dict[str, Array], result: int, opset: int = 17, **attrs: Any
) -> onnx.ModelProto:
    """One node; `inputs` gives their order, if not that of `given` and `constants`. Given shapes are symbolic."""
    order = attrs.pop("inputs", [*given, *constants])
    node = helper.make_node(op, order, ["y"], name="the_node", domain=ops.DOMAIN, **attrs)
    inputs = [
        helper.make_tensor_value_info(name, TYPES[value.dtype], [f"{name}{i}" for i in range(value.ndim)])
        for name, value in given.items()
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    output = helper.make_tensor_value_info("y", result, None)
    graph = helper.make_graph([node], "g", inputs, [output], tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def open_with_library(proto: onnx.ModelProto | str, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    ops.register(options)
    source = proto if isinstance(proto, str) else proto.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, feeds: dict[str, Array]) -> Array:
    """The only output, bfloat16 included."""
    values = {name: _value(array) for name, array in feeds.items()}
    found = session.run_with_ort_values(["y"], values)[0]
    if found.data_type() != "tensor(bfloat16)":
        result: Array = found.numpy()
        return result
    import ctypes

    shape = found.shape()
    buffer = (ctypes.c_char * (2 * int(np.prod(shape)))).from_address(found.data_ptr())
    return np.frombuffer(buffer, ml_dtypes.bfloat16).reshape(shape).copy()


def _value(array: Array) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
