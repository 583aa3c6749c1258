"""Shapes and small contents without running anything, checked against what a run gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from cleanup.torchscript_decoder import Sizes, build
from cleanup.torchscript_decoder import feeds as decoder_feeds
from onnx import helper, numpy_helper, parser

from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.ir.shapes import SymbolicValues, ensure_shapes, infer_shapes, shape_of
from onnxslim_llm.ir.shapes.dims import Dim


def model(text: str, opset: int = 18, **initializers: Any) -> Model:
    text = text.strip()
    header = "" if text.startswith("<") else f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    proto = parser.parse_model(header + text)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.SetInParent()
    for name, value in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return from_proto(proto)


def tensors(of: Model) -> dict[str, gs.Variable]:
    return {t.name: t for graph in of.graphs() for node in graph.nodes for t in node.outputs}


def shape(of: Model, name: str) -> str:
    found = infer_shapes(of).shape_of(tensors(of)[name])
    return "unknown" if found is None else ", ".join(map(str, found))


def content(of: Model, name: str) -> Any:
    value = infer_shapes(of).value_of(tensors(of)[name])
    return None if value is None else [item if item is None else str(item) for item in value.reshape(-1)]


def test_what_is_inferred_is_marked_and_not_written() -> None:
    graph = model("g (float[N, 4] x) => (float[N, 4] y) { a = Exp (x)  y = Neg (a) }")
    before = graph.to_proto().SerializeToString(deterministic=True)
    infer_shapes(graph)
    a = tensors(graph)["a"]
    assert (a.dtype, a.shape, a.inferred) == (np.float32, ["N", 4], True)
    assert graph.to_proto().SerializeToString(deterministic=True) == before
    assert graph.copy().to_proto().SerializeToString(deterministic=True) == before


def test_better_information_is_kept_and_gaps_are_filled() -> None:
    graph = model("g (float[N, 4] x) => (float[N, 4] y) { a = Exp (x)  b = Abs (a)  y = Neg (b) }")
    named = tensors(graph)
    named["a"].dtype, named["a"].shape = np.dtype(np.float32), [7, "width"]
    named["b"].dtype, named["b"].shape = np.dtype(np.float32), [None, "width"]
    infer_shapes(graph)
    assert named["a"].shape == [7, 4]  # a name gives way to a number, a number to nothing
    assert named["b"].shape[1] == 4


def test_declared_inputs_and_outputs_are_left() -> None:
    graph = model("g (float[N, M] x) => (float[P, Q] y) { y = Reshape (x, s) }", s=[3, 4])
    infer_shapes(graph)
    assert graph.graph.outputs[0].shape == ["P", "Q"]
    assert shape_of(graph.graph.outputs[0]) == (3, 4)


def test_names_that_onnx_makes_up_are_no_names() -> None:
    graph = model("g (float[N] x, int64[1] s) => (float[M] y) { a = Expand (x, s)  y = Neg (a) }")
    infer_shapes(graph)
    assert tensors(graph)["a"].shape == [None]


def test_ensure_infers_only_what_is_missing() -> None:
    graph = model("g (float[N, 4] x) => (float[N, 4] y) { a = Exp (x)  y = Neg (a) }")
    ensure_shapes(graph)
    a = tensors(graph)["a"]
    a.shape = ["changed", 4]
    ensure_shapes(graph)
    assert a.shape == ["changed", 4]
    a.shape = None
    ensure_shapes(graph)
    assert a.shape == ["N", 4]


def test_unknown_operators_leave_gaps_and_raise_nothing() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 18, "foreign" : 1]>
        g (float[N, 4] x) => (float[N, 4] y) { a = foreign.F (x)  b = Exp (a)  c = Add (b, x)  y = NoSuchOp (c) }"""
    graph = model(text)
    assert shape(graph, "b") == "unknown"


def test_a_model_that_cannot_be_right_raises_nothing() -> None:
    graph = model(
        "g (float[2, 3] x) => (float[N, M] y) { t = Transpose <perm = [0, 1, 2]> (x)  y = Squeeze (t, a) }", a=[5]
    )
    infer_shapes(graph)


def test_subgraphs_see_what_is_around_them() -> None:
    text = """
        g (bool c, float[N, 4] x) => (float[N, 4] y) {
            e = Exp (x)
            y = If (c) <
                then_branch = t () => (float[P, Q] p) { s = Sin (e)  p = Neg (s) },
                else_branch = f () => (float[P, Q] q) { q = Abs (e) }>
        }"""
    graph = model(text)
    infer_shapes(graph)
    assert tensors(graph)["s"].shape == ["N", 4]


def test_names_in_the_body_of_a_loop_are_not_those_outside() -> None:
    text = """
        g (int64 n, bool c, float[N] x) => (float[M] y) {
            y = Loop (n, c, x) <body = b (int64 i, bool go, float[N] v) => (bool go2, float[K] w) {
                go2 = Identity (go)  w = Concat <axis = 0> (v, one)  t = Neg (v) }>
        }"""
    found = shape(model(text, one=np.ones(1, np.float32)), "t")
    assert found.startswith("?")


# --- sizes as expressions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Concat <axis = 1> (x, z)", "B, P + S, 8"),
        ("t = Concat <axis = 1> (x, z)  y = Concat <axis = 1> (t, x)", "B, 2*P + S, 8"),
        ("t = Transpose <perm = [2, 0, 1]> (x)  y = MatMul (t, x)", "8, B, 8"),
        ('y = Einsum <equation = "bpd, sq -> pbq"> (x, m)', "P, B, 8"),
        ('y = Einsum <equation = "...d -> ..."> (x)', "B, P"),
        ("y = Flatten <axis = 2> (x)", "B*P, 8"),
        ("y = Reshape (x, i0_m1)", "B, 8*P"),
        ("y = Reshape (x, i0_0_2_4)", "B, P, 2, 4"),
        ("y = Reshape (x, im1_4)", "2*B*P, 4"),
        ("y = Unsqueeze (x, i1)", "B, 1, P, 8"),
        ("y = ReduceSum <keepdims = 0> (x, i1)", "B, 8"),
        ("y = ReduceSum (x, im1)", "B, P, 1"),
        ("y = ArgMax <axis = 1, keepdims = 0> (x)", "B, 8"),
        ("y = Tile (x, i1_2_3)", "B, 2*P, 24"),
        ("y = Slice (x, i2, iMAX, i2)", "B, P, 6"),
        ("y = Slice (x, i0, im1, i2)", "B, P, 7"),
        ("y = Slice (x, i0, iMAX, i2, i2)", "B, P, 4"),
        ("y = Slice (x, i0, iMAX, i1)", "B, P, 8"),
        ("y = Gather <axis = 1> (x, i1_2_3)", "B, 3, 8"),
        ("a, y = Split <axis = 2> (x, i2_6)", "B, P, 6"),
        ("a, b, y = Split <axis = 2, num_outputs = 3> (x)", "B, P, 2"),
        ("y = Gemm <transA = 1> (m, m)", "8, 8"),
        ("s = Shape (x)  y = ConstantOfShape (s)", "B, P, 8"),
        ("s = Shape <start = 1, end = 2> (x)  q = Squeeze (s)  y = Range (n0, q, n1)", "P"),
        ("s = Size (x)  y = Range (n0, s, n1)", "8*B*P"),
        ("y = Where (c, x, v)", "B, P, 8"),
        ("y = Trilu (x)", "B, P, 8"),
    ],
)
def test_sizes(body: str, expected: str) -> None:
    numbers = {"i0": [0], "i1": [1], "i2": [2], "im1": [-1], "iMAX": [2**63 - 1], "i0_m1": [0, -1], "im1_4": [-1, 4]}
    numbers |= {"i0_0_2_4": [0, 0, 2, 4], "i1_2_3": [1, 2, 3], "i2_6": [2, 6], "n0": 0, "n1": 1}  # type: ignore[dict-item]
    used = {
        k: np.array(v)
        for k, v in numbers.items()
        if k in body.replace(",", " ").replace(")", " ").replace("(", " ").split()
    }
    inputs = "float[B, P, 8] x, float[B, S, 8] z, float[K, 8] m, bool[1] c, float[8] v"
    text = f"g ({inputs}) => (float[u] out) {{ {body}  out = Identity (y) }}"
    found = shape(model(text, **used), "y")
    assert found == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Shape (x)", ["B", "P", "8"]),
        ("s = Shape (x)  y = Gather (s, n1)", ["P"]),
        ("s = Shape (x)  y = Slice (s, i1, i2)", ["P"]),
        ("s = Shape (x)  a = Gather (s, n1)  y = Add (a, a)", ["2*P"]),
        ("s = Shape (x)  a = Gather (s, n2)  y = Div (a, n2)", ["4"]),
        ("s = Shape (x)  a = Gather (s, n1)  y = Mul (a, n2)", ["2*P"]),
        ("s = Shape (x)  a = Gather (s, n1)  b = Sub (a, n1)  y = Div (b, n2)", [None]),
        ("s = Shape (x)  y = Concat <axis = 0> (s, i1)", ["B", "P", "8", "1"]),
        ("s = Shape (x)  y = Concat <axis = 0> (s, r)", ["B", "P", "8", None]),
        ("s = Shape (x)  y = Equal (s, im1)", ["False", "False", "False"]),
        ("s = Shape (x)  y = Less (s, n1)", [None, None, "False"]),
        ("s = Shape (x)  e = Equal (s, im1)  y = Where (e, i2, s)", ["B", "P", "8"]),
        ("s = Shape (x)  y = ReduceProd <keepdims = 0> (s)", ["8*B*P"]),
        ("s = Shape (x)  y = Cast <to = 6> (s)", ["B", "P", "8"]),
        ("s = Shape (x)  y = Cast <to = 1> (s)", None),
        ("s = Shape (x)  a = Gather (s, n1)  y = Unsqueeze (a, i0)", ["P"]),
        ("s = Shape (x)  a = Gather (s, n1)  y = Max (a, n0)", ["P"]),
        ("s = Shape (x)  a = Gather (s, n1)  y = Max (a, n1)", [None]),
        ("s = Shape (x)  t = Shape (z)  a = Gather (s, n1)  b = Gather (t, n1)  y = Min (a, b)", [None]),
        ("y = Range (n0, n4, n1)", ["0", "1", "2", "3"]),
        ("c = ConstantOfShape <value = int64[1] {3}> (i2)  y = Neg (c)", ["-3", "-3"]),
        ("c = Constant <value_ints = [3, 4]> ()  y = Identity (c)", ["3", "4"]),
    ],
)
def test_contents(body: str, expected: list[str | None] | None) -> None:
    numbers = {"i0": [0], "i1": [1], "i2": [2], "im1": [-1], "n0": 0, "n1": 1, "n2": 2, "n4": 4}
    used = {
        k: np.array(v)
        for k, v in numbers.items()
        if k in body.replace(",", " ").replace(")", " ").replace("(", " ").split()
    }
    text = f"g (float[B, P, 8] x, float[B, S, 8] z, int64[1] r) => (int64[u] out) {{ {body}  out = Identity (y) }}"
    assert content(model(text, **used), "y") == expected


def test_caches_are_told_by_being_concatenated() -> None:
    graph = model("g (float[B, P] past, float[B, S] x) => (float[B, T] y) { y = Concat <axis = 1> (past, x) }")
    assert infer_shapes(graph).may_be_empty == {"P", "S"}


def test_the_default_of_an_input_is_no_content() -> None:
    graph = model("g (float[N] x, int64[1] s = {4}) => (float[M] y) { t = Reshape (x, s)  y = Neg (t) }")
    assert "4" not in shape(graph, "t")


def evaluate(dim: Dim, sizes: dict[str, int]) -> int:
    return dim if isinstance(dim, int) else int(eval(str(dim), {}, sizes))


@pytest.mark.parametrize(("batch", "tokens", "past"), [(1, 5, 0), (2, 3, 4)])
def test_a_decoder_runs_with_the_shapes_that_were_inferred(batch: int, tokens: int, past: int) -> None:
    sizes = Sizes()
    proto = build(sizes)
    graph = from_proto(proto)
    values: SymbolicValues = infer_shapes(graph)
    named = {"batch_size": batch, "sequence_length": tokens, "past_sequence_length": past}
    named["total_sequence_length"] = past + tokens
    checked = [t for node in graph.graph.nodes for t in node.outputs if t.name and t.name not in ("logits",)]
    probe = onnx.ModelProto.FromString(proto.SerializeToString())
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(t.name) for t in checked)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, ["CPUExecutionProvider"])
    results = session.run(None, decoder_feeds(sizes, batch, tokens, past))
    for tensor, result in zip(checked, results, strict=True):
        found = values.shape_of(tensor)
        assert found is not None, tensor.name
        assert len(found) == result.ndim
        for dim, size in zip(found, result.shape, strict=True):
            assert "?" in str(dim) or evaluate(dim, named) == size, tensor.name
        assert np.dtype(tensor.dtype) == result.dtype, tensor.name
        value = values.value_of(tensor)
        if value is not None:
            known = [(v, r) for v, r in zip(value.reshape(-1), result.reshape(-1), strict=True) if v is not None]
            assert [evaluate(v, named) for v, _ in known] == [r for _, r in known], tensor.name
