from __future__ import annotations

import numpy as np
import onnx
import pytest
from cleanup_graphs import apply, graph, initializers, model_of, ops, reasons
from onnx import TensorProto, numpy_helper

from onnxslim_llm.ir.weights import DerivedWeight, ViewWeight, weight_of
from onnxslim_llm.passes.cleanup.fold_constants import LAZY_BYTES, FoldConstants
from onnxslim_llm.rewrite.context import Context

ADD = "g (float[N] x) => (float[N] y) {{ {0}  y = Add (x, c) }}"
BIG = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
PRODUCT = "g (float[N, {0}] x) => (float[N, {1}] y) {{ {2}  y = MatMul (x, t) }}"


def test_big_is_what_the_pass_calls_large() -> None:
    assert BIG.nbytes >= LAZY_BYTES


def test_a_chain_is_folded_in_one_go() -> None:
    text = ADD.format("i = Sqrt (a)  j = Neg (i)  k = Exp (j)  c = ReduceMax <axes = [0], keepdims = 1> (k)")
    after, change = apply(FoldConstants(), graph(text, a=np.array([4.0, 9.0], np.float32)))
    assert ops(after) == {"Add": 1}
    np.testing.assert_allclose(initializers(after)["c"], [np.exp(-2.0)], rtol=1e-6)
    assert change.sites == ["i", "j", "k", "c"]


@pytest.mark.parametrize("opset", [11, 13])
def test_axes_as_attribute_and_as_input(opset: int) -> None:
    body = "c = Unsqueeze <axes = [0]> (a)" if opset < 13 else "c = Unsqueeze (a, axes)"
    more = {} if opset < 13 else {"axes": np.array([0])}
    after, _ = apply(FoldConstants(), graph(ADD.format(body), opset, a=np.array(2.0, np.float32), **more))
    assert ops(after) == {"Add": 1}
    assert initializers(after)["c"].shape == (1,)


def test_several_outputs() -> None:
    text = "g (float[N] x) => (float[N] y) { a, b = Split (w)  s = Add (x, a)  y = Mul (s, b) }"
    after, change = apply(FoldConstants(), graph(text, w=np.array([2.0, 3.0], np.float32)))
    assert ops(after) == {"Add": 1, "Mul": 1}
    assert change.sites == ["a", "b"]


def test_types_are_those_of_the_operator() -> None:
    text = "g (int64[N] x) => (int64[N] y) { d = Div (a, b)  y = Add (x, d) }"
    after, _ = apply(FoldConstants(), graph(text, a=np.array([-7]), b=np.array([2])))
    np.testing.assert_array_equal(initializers(after)["d"], np.array([-3]), strict=True)  # towards zero


def test_constants_inside_of_a_branch() -> None:
    text = """
        g (bool c, float[N] x) => (float[N] y) <float a = {2.0}> {
            y = If (c) <
                then_branch = t () => (float[N] p) <float b = {3.0}> { m = Mul (a, b)  p = Add (x, m) },
                else_branch = e () => (float[N] q) { q = Sub (x, a) }>
        }"""
    after, _ = apply(FoldConstants(), graph(text))
    assert ops(after) == {"If": 1, "Add": 1, "Sub": 1}


@pytest.mark.parametrize(
    ("make", "more"),
    [
        ("c = Expand (one, shape)", {"one": np.ones((1, 1), np.float32), "shape": np.array([64, 64])}),
        ("c = ConstantOfShape (shape)", {"shape": np.array([64, 64])}),
        ("c = Tile (one, shape)", {"one": np.ones((1, 1), np.float32), "shape": np.array([64, 64])}),
        ("c = Add (a, b)", {"a": np.ones((64, 1), np.float32), "b": np.ones((1, 64), np.float32)}),
        (
            "r = Range (start, end, step)  c = Cast <to = 1> (r)",
            dict(zip(["start", "end", "step"], map(np.array, [0, 4096, 1]), strict=True)),
        ),
    ],
    ids=["Expand", "ConstantOfShape", "Tile", "broadcast", "Range"],
)
def test_what_would_make_the_file_grow_is_left(make: str, more: dict[str, np.ndarray]) -> None:
    shape = "4096" if "Range" in make else "64, 64"
    text = f"g (float[{shape}] x) => (float[{shape}] y) {{ {make}  y = Add (x, c) }}"
    _, change = apply(FoldConstants(), graph(text, **more))
    assert not change
    assert "bytes larger" in next(iter(reasons(change).values()))


def test_more_growth_can_be_allowed() -> None:
    text = "g (float[64, 64] x) => (float[64, 64] y) { c = ConstantOfShape (shape)  y = Add (x, c) }"
    model = model_of(graph(text, shape=np.array([64, 64])))
    assert FoldConstants(max_growth=64 * 64 * 4).apply(model, Context())


@pytest.mark.parametrize(
    "make",
    [
        "c = DequantizeLinear (q, scale, zero)",
        "r = DequantizeLinear (q, scale, zero)  c = Neg (r)",
        "f = Cast <to = 1> (q)  r = QuantizeLinear (f, scale, zero)  c = DequantizeLinear (r, scale, zero)",
    ],
)
def test_quantization_is_never_undone(make: str) -> None:
    more = {
        "q": np.array([1, -2], np.int8),
        "scale": np.array(0.5, np.float32),
        "zero": np.array(1, np.int8),
    }
    text = f"g (float[2] x) => (float[2] y) {{ {make}  y = Add (x, c) }}"
    after, _ = apply(FoldConstants(), graph(text, **more))
    assert ops(after)["DequantizeLinear"] == 1


def test_four_bit_constants_are_left() -> None:
    proto = graph(
        "g (float[2] x) => (float[2] y) { c = Cast <to = 1> (q)  y = Add (x, c) }", 21, 10, q=np.zeros(2, np.int8)
    )
    proto.graph.initializer[0].CopyFrom(onnx.helper.make_tensor("q", TensorProto.INT4, [2], [1, -2]))
    _, change = apply(FoldConstants(), proto)
    assert reasons(change) == {"c": "it reads a quantized tensor"}


def test_sparse_constants_are_left() -> None:
    proto = graph("g (float[3] x) => (float[3] y) { c = Neg (s)  y = Add (x, c) }", s=np.ones(3, np.float32))
    del proto.graph.initializer[:]
    values = onnx.helper.make_tensor("s", TensorProto.FLOAT, [1], [2.0])
    indices = onnx.helper.make_tensor("at", TensorProto.INT64, [1], [1])
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3]))
    _, change = apply(FoldConstants(), proto)
    assert reasons(change) == {"c": "it reads a sparse tensor"}


def test_strings_are_left() -> None:
    text = "g (string[N] x) => (string[M] y) { y = Concat <axis = 0> (x, c) }"
    proto = graph(text, c=np.array(["a", "b"], object))
    proto.graph.node.insert(0, onnx.helper.make_node("Identity", ["c"], ["d"]))
    proto.graph.node[1].input[1] = "d"
    change = FoldConstants().apply(model_of(proto), Context())
    assert reasons(change) == {"d": "it reads strings"}


def test_random_and_foreign_operators_are_left() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            r = RandomNormalLike (a)  f = local.F (a)  n = Mul (r, f)  z = Mul (n, zero)  y = Add (x, z)
        }
        <domain: "local", opset_import: ["" : 17]>
        F (p) => (q) { q = Exp (p) }"""
    after, change = apply(FoldConstants(), graph(text, zero=np.array([0.0], np.float32)))
    assert not change
    assert ops(after)["RandomNormalLike"] == 1


def test_the_default_of_an_input_is_no_constant() -> None:
    _, change = apply(
        FoldConstants(), graph("g (float[2] x, float a = {2.0}) => (float[2] y) { c = Neg (a)  y = Add (x, c) }")
    )
    assert not change


def test_an_output_of_the_graph_is_left() -> None:
    after, change = apply(
        FoldConstants(),
        graph("g (float[2] x) => (float[2] y, float c) <float a = {2.0}> { c = Neg (a)  y = Add (x, c) }"),
    )
    assert ops(after) == {"Neg": 1, "Add": 1}
    assert reasons(change) == {"c": "its result is an output of the graph"}


def test_values_that_the_standard_leaves_open_are_left_to_the_runtime() -> None:
    text = "g (int32[1] x) => (int32[1] y) { c = Cast <to = 6> (a)  y = Add (x, c) }"
    model = model_of(graph(text, a=np.array([np.nan], np.float32)))
    change = FoldConstants().apply(model, Context())
    assert reasons(change) == {"c": "the reference implementation cannot compute it"}


# --- large weights ----------------------------------------------------------------------------------------------------


def folded(proto: onnx.ModelProto, name: str) -> object:
    model = model_of(proto)
    FoldConstants().apply(model, Context())
    return weight_of(next(t for t in model.constants() if t.name == name))


@pytest.mark.parametrize("op", ["Transpose", "Reshape"])
def test_moving_a_large_weight_is_a_view(op: str) -> None:
    make = "t = Transpose <perm = [1, 0]> (w)" if op == "Transpose" else "t = Reshape (w, shape)"
    more = {} if op == "Transpose" else {"shape": np.array([256, 128])}
    proto = graph(PRODUCT.format(256, 128, make), w=BIG, **more)
    after, _ = apply(FoldConstants(), proto)
    assert ops(after) == {"MatMul": 1}
    assert isinstance(folded(proto, "t"), ViewWeight)


def test_narrowing_a_large_weight_is_recorded_and_done_later() -> None:
    text = "g (int64[N] x) => (float16[N, 256] y) { t = Cast <to = 10> (w)  y = Gather (t, x) }"
    proto = graph(text, w=BIG)
    after, _ = apply(FoldConstants(), proto)
    assert ops(after) == {"Gather": 1}
    np.testing.assert_array_equal(initializers(after)["t"], BIG.astype(np.float16), strict=True)
    assert isinstance(folded(proto, "t"), DerivedWeight)


def test_narrowing_to_bfloat16_and_infinity() -> None:
    text = "g (bfloat16[N, 128] x) => (bfloat16[N, 256] y) { t = Cast <to = 16> (w)  y = MatMul (x, t) }"
    weight = BIG.copy()
    weight[0, :3] = [3.4e38, -3.4e38, np.nan]
    model = model_of(graph(text, w=weight))
    FoldConstants().apply(model, Context())
    stored = numpy_helper.to_array(model.to_proto().graph.initializer[0])
    expected = weight.astype(stored.dtype)
    np.testing.assert_array_equal(stored.view(np.uint16), expected.view(np.uint16))


def test_several_tiles_of_a_cast() -> None:
    from onnxslim_llm.ir.weights import ArrayWeight
    from onnxslim_llm.passes.cleanup.lazy_fold import CastJob

    values = np.arange(5 << 20, dtype=np.float32)
    job = CastJob(ArrayWeight(values), TensorProto.FLOAT16, "w")
    assert len(job.tiles()) == 3
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(job.compute()[0].view(np.float16), values.astype(np.float16))


@pytest.mark.parametrize(
    ("make", "more", "reason"),
    [
        ("t = Cast <to = 11> (w)  ", {}, "the weight would become larger"),
        (
            "e = Cast <to = 6> (w)  t = Cast <to = 11> (e)",
            {},
            "it casts a large weight to or from a type that is no float",
        ),
        ("n = Neg (w)  t = Cast <to = 11> (n)", {}, "it computes on a large weight"),
        ("n = Mul (s, w)  t = Cast <to = 11> (n)", {"s": np.array(2, np.float32)}, "it computes on a large weight"),
    ],
)
def test_other_work_on_large_weights_is_left(make: str, more: dict[str, np.ndarray], reason: str) -> None:
    text = f"g (double[N, 128] x) => (double[N, 256] y) {{ {make}  y = MatMul (x, t) }}"
    _, change = apply(FoldConstants(), graph(text, w=BIG, **more))
    assert reason in reasons(change).values()


@pytest.mark.parametrize(
    "make", ["t = Transpose (w)", "h = Cast <to = 10> (w)  f = Cast <to = 1> (h)  t = Transpose (f)"]
)
def test_a_shared_large_weight_is_not_stored_twice(make: str) -> None:
    text = f"""
        g (int64[N] ids, float[N, 256] x) => (float[N, 256] e, float[N, 128] y) {{
            e = Gather (w, ids)  {make}  y = MatMul (x, t)
        }}"""
    _, change = apply(FoldConstants(), graph(text, w=BIG))
    assert not change
    assert "the weight is used elsewhere too: folding would store it twice" in reasons(change).values()
