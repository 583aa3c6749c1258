"""The byte layouts, read by the real onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnxslim_llm.custom_ops.layout import storage_bits
from onnxslim_llm.custom_ops.quantize import BlockSpec, Layout, TileResult, quantize_tile
from onnxslim_llm.custom_ops.reference import dequantize

Array = np.ndarray[Any, Any]

ROWS, COLUMNS = 128, 24
TAIL_ROWS = 136  # a last block of 8 rows
# float32 dot products over at most 136 terms: 136 * 2^-24 relative to the sum of magnitudes, which stays below 100.
PRODUCT_TOLERANCE = 136 * 2**-24 * 100


def weight(rows: int = ROWS, columns: int = COLUMNS) -> Array:
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)


def tensor(name: str, kind: int, shape: tuple[int, ...], values: Array) -> TensorProto:
    return TensorProto(name=name, data_type=kind, dims=shape, raw_data=values.tobytes())


def run(node: onnx.NodeProto, initializers: list[TensorProto], feed: Array, opset: int = 21) -> Array:
    """The node alone in a session without graph optimizations."""
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    inputs = [helper.make_tensor_value_info("x", kinds[feed.dtype], feed.shape)] if feed.size else []
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10 if opset < 25 else 13)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": feed} if feed.size else {})[0]
    return result


def zero_point_inputs(result: TileResult, kind: int, shape: tuple[int, ...] | None = None) -> list[TensorProto]:
    if result.zero_points is None:
        return []
    return [tensor("zero_points", kind, shape or result.zero_points.shape, result.zero_points)]


@pytest.mark.parametrize("rows", [ROWS, TAIL_ROWS])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (4, 128), (8, 32), (8, 64), (2, 32), (2, 64)])
def test_matmul_nbits(bits: int, block: int, symmetric: bool, rows: int) -> None:
    result = quantize_tile(weight(rows), BlockSpec(bits, block, symmetric), "search")
    initializers = [
        tensor("codes", TensorProto.UINT8, result.codes.shape, result.codes),
        tensor("scales", TensorProto.FLOAT, result.scales.shape, result.scales),
        *zero_point_inputs(result, TensorProto.UINT8),
    ]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *(i.name for i in initializers)],
        ["y"],
        domain="com.microsoft",
        K=rows,
        N=COLUMNS,
        bits=bits,
        block_size=block,
        accuracy_level=1,
    )
    x = np.random.default_rng(1).standard_normal((3, rows)).astype(np.float32)
    np.testing.assert_allclose(run(node, initializers, x), x @ dequantize(result.buffers), atol=PRODUCT_TOLERANCE)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 32), (2, 32)])
def test_gather_block_quantized(bits: int, block: int, symmetric: bool) -> None:
    table = weight().T  # an embedding [V, D]: its logical weight is W[D, V]
    result = quantize_tile(table.T, BlockSpec(bits, block, symmetric))
    initializers = [
        tensor("codes", TensorProto.UINT8, (COLUMNS, ROWS * bits // 8), result.codes),
        tensor("scales", TensorProto.FLOAT, result.scales.shape, result.scales),
        *zero_point_inputs(result, TensorProto.UINT8),
    ]
    names = [i.name for i in initializers]
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "x", *names[1:]],
        ["y"],
        domain="com.microsoft",
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    rows = np.array([[5, 0], [COLUMNS - 1, 5]], np.int64)
    np.testing.assert_array_equal(run(node, initializers, rows), dequantize(result.buffers).T[rows])


KINDS = {
    (2, True): TensorProto.INT2,
    (2, False): TensorProto.UINT2,
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
}


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS + 1])
@pytest.mark.parametrize("rows", [ROWS, TAIL_ROWS - 1])
@pytest.mark.parametrize("layout", [Layout.BLOCKED_KN, Layout.BLOCKED_NK])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize_linear(bits: int, symmetric: bool, layout: Layout, rows: int, columns: int) -> None:
    spec = BlockSpec(bits, 32, symmetric)
    result = quantize_tile(weight(rows, columns), spec, layout=layout)
    by_column = layout is Layout.BLOCKED_NK
    shape = (columns, rows) if by_column else (rows, columns)
    kind = KINDS[storage_bits(spec, layout), symmetric]
    initializers = [
        tensor("codes", kind, shape, result.codes),
        tensor("scales", TensorProto.FLOAT, result.scales.shape, result.scales),
        *zero_point_inputs(result, kind, result.scales.shape),
    ]
    names = [i.name for i in initializers]
    node = helper.make_node("DequantizeLinear", names, ["y"], axis=1 if by_column else 0, block_size=32)
    actual = run(node, initializers, np.empty(0), opset=25 if bits == 2 else 21)
    expected = dequantize(result.buffers)
    np.testing.assert_array_equal(actual, expected.T if by_column else expected)
