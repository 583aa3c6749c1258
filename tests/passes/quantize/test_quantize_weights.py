from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from block_models import PRODUCT, VOCAB, model_of, product, proto, rounded, run, skipped, tied, weights, with_weight
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.concepts.block_weights import BLOCK_GATHER, BLOCK_MATMUL
from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.jobs import DerivedWeight
from onnxslim_llm.passes.quantize.quantize_weights import LONG_BLOCK, QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.targets import get_target

#: Float32 products of at most 128 terms in another order: 128 * 2^-24 each, two in a row, of the largest output.
FLOAT_TOLERANCE = 2 * 128 * 2**-24
#: The same in float16 after products that are computed in float32: three roundings of the result to 11 bits.
HALF_TOLERANCE = 3 * 2**-11

IDS = {"ids": np.array([[0, 5, VOCAB - 1], [7, 7, 1]], np.int64)}


def quantize(source: onnx.ModelProto, **options: Any) -> tuple[Model, Change]:
    # A lone product is a classifier by its place; these tests want to choose its bits by `bits`.
    options = {"lm_head_bits": options.get("bits", 4), "symmetric": True, "scale_dtype": "activation", **options}
    model = model_of(source)
    return model, QuantizeWeights(**options).apply(model, Context())


def feeds(rows: int) -> dict[str, Any]:
    return {"x": weights(9, 3, rows)}


def assert_same(actual: Any, expected: Any, tolerance: float = FLOAT_TOLERANCE) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    largest = np.abs(expected.astype(np.float64)).max()
    difference = np.abs(actual.astype(np.float64) - expected).max()
    assert difference <= tolerance * largest


# what it does


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "block"), [(128, 48, 32), (70, 33, 16), (40, 17, 0), (96, 64, 64)])
def test_results_are_those_of_the_rounded_weight(
    bits: int, symmetric: bool, rows: int, columns: int, block: int
) -> None:
    source = product(rows, columns)
    model, change = quantize(source, bits=bits, block=block, symmetric=symmetric, min_elements=0)
    assert change.sites == ["W"]
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    expected = with_weight(source, "W", rounded(weights(1, rows, columns), bits, block, symmetric))
    assert_same(run(after, feeds(rows)), run(expected, feeds(rows)))


def test_two_bits_need_a_newer_opset() -> None:
    source = product(64, 32, opset=25, ir_version=10)
    model, _ = quantize(source, bits=2, min_elements=0)
    assert model.graph.ir_version >= 13  # the first with INT2
    expected = with_weight(source, "W", rounded(weights(1, 64, 32), 2, 32, True))
    assert_same(run(model.to_proto(), feeds(64)), run(expected, feeds(64)))


def test_an_old_model_is_converted() -> None:
    source = product(64, 32, opset=17, ir_version=8)
    model, change = quantize(source, min_elements=0)
    assert model.opset() == 21
    assert change.detail["converted_to_opset"] == 21
    expected = with_weight(source, "W", rounded(weights(1, 64, 32), 4, 32, True))
    assert_same(run(model.to_proto(), feeds(64)), run(expected, feeds(64)))


def test_two_runs_with_different_needs() -> None:
    text = "agraph (float[m, 64] x) => (float[m, 64] y) { a = MatMul (x, V)\n y = MatMul (a, W) }"
    source = proto(text, V=weights(1, 64, 64) / 8, W=weights(2, 64, 64) / 8)
    model, _ = quantize(source, exclude=("^V$",))
    QuantizeWeights(bits=2, symmetric=True).apply(model, Context())
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)  # functions and model have one opset
    assert model.opset() == 25
    expected = with_weight(source, "V", rounded(weights(1, 64, 64) / 8, 2, 32, True))
    expected = with_weight(expected, "W", rounded(weights(2, 64, 64) / 8, 4, 32, True))
    assert_same(run(after, feeds(64)), run(expected, feeds(64)))


GEMM = "agraph (float[m, K] x) => (float[m, N] y) { y = Gemm <ATTRIBUTES> (x, WBIAS) }"


@pytest.mark.parametrize("bias", ["", "b"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.25, 0.0)])
def test_gemm(bias: str, transposed: bool, alpha: float, beta: float) -> None:
    rows, columns = 64, 48
    text = GEMM.replace("ATTRIBUTES", f"alpha = {alpha}, beta = {beta}, transB = {int(transposed)}")
    text = text.replace("WBIAS", "W, b" if bias else "W").replace("K]", f"{rows}]").replace("N]", f"{columns}]")
    weight = weights(1, rows, columns)
    stored = {"W": np.ascontiguousarray(weight.T) if transposed else weight}
    source = proto(text, **stored, **({"b": weights(4, columns)} if bias else {}))
    model, change = quantize(source, min_elements=0)
    assert change.sites == ["W"]
    assert "Gemm" not in model.census()
    near = rounded(weight, 4, 32, True)
    expected = with_weight(source, "W", near.T if transposed else near)
    assert_same(run(model.to_proto(), feeds(rows)), run(expected, feeds(rows)))


def test_embedding_and_classifier_share_codes() -> None:
    source = tied()
    model, change = quantize(source)
    assert change.sites == ["E", "W"]
    assert model.census() == {
        "onnxslim_llm::BlockGather": 1,
        "onnxslim_llm::BlockMatMul": 2,
        "Tanh": 1,
        "Add": 1,
    }
    gather = next(node for _, node in calls(model, BLOCK_GATHER))
    classifier = [node for _, node in calls(model, BLOCK_MATMUL)][-1]
    assert gather.inputs[1] is classifier.inputs[1]
    near = rounded(numpy_helper.to_array(source.graph.initializer[0]).T, 8, LONG_BLOCK, True).T
    expected = with_weight(source, "E", near)
    expected = with_weight(expected, "W", rounded(numpy_helper.to_array(source.graph.initializer[1]), 4, 32, True))
    assert_same(run(model.to_proto(), IDS), run(expected, IDS))


def test_names_survive_and_say_what_they_are() -> None:
    model, _ = quantize(tied(), symmetric=False)
    names = {tensor.name for tensor in model.constants()}
    assert names == {"E_q8", "E_scale", "E_zp", "W_q4", "W_scale", "W_zp"}
    assert [tensor.name for tensor in model.graph.outputs] == ["y"]


def test_a_weight_with_two_readers_is_quantized_once() -> None:
    text = "agraph (float[m, 64] x) => (float[m, 64] y) { a = MatMul (x, W)\n y = MatMul (a, W) }"
    source = proto(text, W=weights(1, 64, 64) / 8)
    model, change = quantize(source)
    assert change.sites == ["W"]
    assert len(list(model.constants())) == 2  # codes and scales, once
    expected = with_weight(source, "W", rounded(weights(1, 64, 64) / 8, 4, 32, True))
    assert_same(run(model.to_proto(), feeds(64)), run(expected, feeds(64)))


def test_equal_initializers_are_quantized_once() -> None:
    text = "agraph (float[m, 64] x) => (float[m, 64] y) { a = MatMul (x, W)\n y = MatMul (a, V) }"
    source = proto(text, W=weights(1, 64, 64) / 8, V=weights(1, 64, 64) / 8)
    model = model_of(source)
    first, second = (t for t in model.constants() if t.name in ("W", "V"))
    second._values = weight_of(first)  # what tying equal initializers leaves behind
    change = QuantizeWeights().apply(model, Context())
    assert len(change.sites) == 1
    jobs = {id(w.job) for w in map(weight_of, model.constants()) if isinstance(w, DerivedWeight)}
    assert len(jobs) == 1


def test_half_precision_keeps_its_type() -> None:
    source = tied(dtype=np.float16)
    model, _ = quantize(source)
    scales = next(t for t in model.constants() if t.name == "W_scale")
    assert scales.dtype == np.float16
    near = rounded(numpy_helper.to_array(source.graph.initializer[1]), 4, 32, True, "float16")
    table = rounded(numpy_helper.to_array(source.graph.initializer[0]).T, 8, LONG_BLOCK, True, "float16").T
    expected = with_weight(with_weight(source, "W", near), "E", table)
    assert_same(run(model.to_proto(), IDS), run(expected, IDS), HALF_TOLERANCE)


def test_a_half_precision_weight_behind_a_cast() -> None:
    text = "agraph (float[m, 64] x) => (float[m, 48] y) { c = Cast <to = 1> (W)\n y = MatMul (x, c) }"
    source = proto(text, W=weights(1, 64, 48, dtype=np.float16))
    model, _ = quantize(source, min_elements=0)
    assert model.census() == {"onnxslim_llm::BlockMatMul": 1}
    expected = with_weight(source, "W", rounded(weights(1, 64, 48, dtype=np.float16), 4, 32, True))
    # The rounded weight is a half itself in `expected`: 2^-11 of each weight.
    assert_same(run(model.to_proto(), feeds(64)), run(expected, feeds(64)), 2**-11)


def test_scales_can_be_stored_in_half_precision() -> None:
    source = product(128, 256)
    model, _ = quantize(source, scale_dtype="float16")
    assert next(t for t in model.constants() if t.name == "W_scale").dtype == np.float16
    expected = with_weight(source, "W", rounded(weights(1, 128, 256), 4, 32, True, "float16"))
    assert_same(run(model.to_proto(), feeds(128)), run(expected, feeds(128)))


def test_few_scales_are_not_worth_a_cast() -> None:
    model, _ = quantize(product(128, 32), scale_dtype="float16")  # 128 scales: 256 bytes would be saved
    assert next(t for t in model.constants() if t.name == "W_scale").dtype == np.float32


def test_weights_in_branches_stay_there() -> None:
    branch = "{{ {name} = MatMul (x, W) }}"
    text = f"""agraph (float[m, 64] x, bool c) => (float[m, 32] y) {{
        y = If (c) <then_branch = a () => (float[m, 32] p) {branch.format(name="p")},
                    else_branch = b () => (float[m, 32] q) {{ r = MatMul (x, W)\n q = Neg (r) }}>
    }}"""
    source = proto(text, W=weights(1, 64, 32))
    model, change = quantize(source, min_elements=0)
    assert change.sites == ["W"]
    expected = with_weight(source, "W", rounded(weights(1, 64, 32), 4, 32, True))
    for choice in (True, False):
        fed = {**feeds(64), "c": np.array(choice)}
        # With optimisations: ONNX Runtime fails to fuse codes that a branch reads from outside.
        assert_same(run(model.to_proto(), fed, optimise=True), run(expected, fed))


def test_a_second_run_changes_nothing() -> None:
    model, _ = quantize(tied())
    before = model.to_proto("omit").SerializeToString(deterministic=True)
    again = QuantizeWeights().apply(model, Context())
    assert not again
    assert model.to_proto("omit").SerializeToString(deterministic=True) == before


def test_two_runs_give_the_same_bytes() -> None:
    first, second = (quantize(tied())[0].to_proto().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


# options


def test_roles_have_their_own_bits() -> None:
    _, change = quantize(tied(), bits=4, embedding_bits=4, lm_head_bits=8)
    by_name = {entry["name"]: entry["bits"] for entry in change.detail["tensors"]}
    assert by_name == {"E": 8, "W": 4}  # the larger one of a tied table
    assert {entry["name"]: entry["block"] for entry in change.detail["tensors"]} == {"E": 64, "W": 32}
    assert change.detail["weights_by_bits"] == {"4": 1, "8": 1}


def test_zero_bits_leave_a_tied_table_alone() -> None:
    _, change = quantize(tied(), embedding_bits=0)
    assert change.sites == ["W"]
    assert skipped(change)["E"] == "its bits are set to 0"


def test_scopes_choose_by_name() -> None:
    scopes = ({"match": "^W$", "bits": 8, "block": 0}, {"match": "nothing", "bits": 3})
    _, change = quantize(tied(), scopes=scopes)
    entry = next(e for e in change.detail["tensors"] if e["name"] == "W")
    assert (entry["bits"], entry["block"]) == (8, 0)


def test_a_block_is_not_longer_than_the_column_needs() -> None:
    _, change = quantize(product(40, 32), block=256, min_elements=0)
    assert change.detail["tensors"][0]["block"] == 64


def test_the_account_says_what_it_costs() -> None:
    _, change = quantize(product(64, 64), block=32)
    entry = change.detail["tensors"][0]
    assert entry["bytes"] == [64 * 64 * 4, 64 * 64 // 2 + 2 * 64 * 4]
    assert change.detail["bits_per_weight"] == 5.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 7}, "bits = 7 is not possible"),
        ({"block": 48}, "block = 48 is not possible"),
        ({"method": "magic"}, "method = 'magic' is not possible"),
        ({"embedding_bits": 1}, "bits = 1 is not possible"),
        ({"exclude": ("(",)}, "is no regular expression"),
        ({"scopes": ({"bits": 8},)}, "a scope needs a pattern"),
        ({"scopes": ({"match": "x", "bit": 8},)}, "a scope has no option 'bit'"),
        ({"scopes": ({"match": "x", "bits": 7},)}, "bits = 7 is not possible"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizeWeights(**options)
    assert said in caught.value.what


def test_a_target_that_cannot_store_the_bits_refuses() -> None:
    step = QuantizeWeights(bits=3)
    with pytest.raises(UsageError, match="cannot store weights of 3 bits"):
        step.requires(model_of(tied()), Context(target=get_target("portable")))
    QuantizeWeights(bits=4).requires(model_of(tied()), Context(target=get_target("portable")))


# what it leaves alone, and why


def left_alone(source: onnx.ModelProto, name: str = "W", **options: Any) -> str:
    """The reason for leaving the weight alone; the model is untouched."""
    options.setdefault("min_elements", 0)
    model, change = quantize(source, **options)
    assert not change.sites
    assert model.to_proto().SerializeToString(deterministic=True) == model_of(source).to_proto().SerializeToString(
        deterministic=True
    )
    return skipped(change)[name]


def test_small_weights() -> None:
    assert "fewer than min_elements = 4096" in left_alone(product(32, 32), min_elements=4096)


@pytest.mark.parametrize(("rows", "columns"), [(8, 512), (512, 8), (64, 0)])
def test_short_sides(rows: int, columns: int) -> None:
    assert f"K = {rows} and N = {columns}: a side below 16" in left_alone(product(rows, columns))


def test_excluded_names() -> None:
    assert left_alone(product(64, 64), exclude=("other", "^W")) == "it is excluded by '^W'"


def test_batched_weights() -> None:
    text = "agraph (float[2, m, 64] x) => (float[2, m, 32] y) { y = MatMul (x, W) }"
    assert "it has 3 dimensions" in left_alone(proto(text, W=weights(1, 2, 64, 32)))


def test_sparse_weights() -> None:
    source = proto("agraph (float[m, 32] x, float[32, 32] W) => (float[m, 32] y) { y = MatMul (x, W) }")
    values = numpy_helper.from_array(np.ones(2, np.float32), "W")
    indices = numpy_helper.from_array(np.array([3, 40], np.int64), "W_indices")
    source.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [32, 32]))
    del source.graph.input[1]
    assert left_alone(source) == "it is stored sparse"


def test_double_precision() -> None:
    text = "agraph (double[m, 32] x) => (double[m, 32] y) { y = MatMul (x, W) }"
    assert left_alone(proto(text, W=weights(1, 32, 32, dtype=np.float64))) == "its type is float64"


def test_products_in_bfloat16() -> None:
    source = proto("agraph (bfloat16[m, 32] x) => (bfloat16[m, 32] y) { y = Neg (x) }")
    source.graph.node[0].CopyFrom(helper.make_node("MatMul", ["x", "W"], ["y"]))
    tensor = helper.make_tensor("W", TensorProto.BFLOAT16, [32, 32], bytes(2 * 32 * 32), raw=True)
    source.graph.initializer.append(tensor)
    assert left_alone(source) == "it is used in bfloat16, which runtimes cannot dequantize to"


def test_left_operands() -> None:
    text = "agraph (float[32, m] x) => (float[32, m] y) { y = MatMul (W, x) }"
    assert left_alone(proto(text, W=weights(1, 32, 32))) == "it is the left operand: blocks would run across rows"


def test_transposed_partners_of_gemm() -> None:
    text = "agraph (float[32, m] x) => (float[m, 32] y) { y = Gemm <transA = 1> (x, W) }"
    assert "transA = 1" in left_alone(proto(text, W=weights(1, 32, 32)))


def test_weights_with_another_reader() -> None:
    text = "agraph (float[m, 32] x) => (float[m, 32] y, float[32, 32] z) { y = MatMul (x, W)\n z = Relu (W) }"
    reason = left_alone(proto(text, W=weights(1, 32, 32)))
    assert reason.startswith("Relu 'z' reads it, too, as floats")


def test_graph_outputs() -> None:
    source = product(32, 32)
    source.graph.output.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [32, 32]))
    assert left_alone(source) == "it is a graph output, too"


def test_graph_inputs() -> None:
    source = product(32, 32)
    source.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [32, 32]))
    assert "whoever runs the model may replace it" in left_alone(source)


def test_weights_that_are_quantized_already() -> None:
    text = """agraph (float[m, 32] x) => (float[m, 32] y) {
        w = DequantizeLinear <axis = 0, block_size = 32> (W, s)
        y = MatMul (x, w)
    }"""
    codes = np.ones((32, 32), np.int8)
    assert left_alone(proto(text, W=codes, s=np.ones((1, 32), np.float32))) == "it is quantized already"


def test_scales_of_quantized_tables() -> None:
    text = """agraph (int64[b, s] ids) => (float[b, s, 64] y) {
        c = Gather (codes, ids)
        s = Gather (W, ids)
        h = DequantizeLinear <axis = 2, block_size = 4> (c, s)
        y = Tanh (h)
    }"""
    source = proto(text, codes=np.ones((64, 64), np.int8), W=np.ones((64, 16), np.float32))
    assert left_alone(source) == "it holds the scales or zero points of a quantized table"


def test_look_ups_of_columns() -> None:
    text = "agraph (int64[s] ids) => (float[64, s] y) { h = Gather <axis = 1> (W, ids)\n y = Tanh (h) }"
    assert left_alone(proto(text, W=weights(1, 64, 64))) == "Gather looks up columns, not rows"


def test_look_ups_of_positions() -> None:
    text = """agraph (float[b, s, 32] q, float[b, s, 32] k, int64[b, s] positions) => (float[b, s, s] y) {
        cos = Gather (W, positions)
        rotated = Mul (q, cos)
        t = Transpose <perm = [0, 2, 1]> (k)
        y = MatMul (rotated, t)
    }"""
    assert "no embedding of tokens" in left_alone(proto(text, W=weights(1, 64, 32)))


def test_look_ups_of_one_row() -> None:
    source = proto("agraph (int64 i) => (float[64] y) { h = Gather (W, i)\n y = Tanh (h) }", W=weights(1, 64, 64))
    assert left_alone(source) == "Gather looks up a single row"


def test_look_ups_of_unknown_rank() -> None:
    source = proto(
        "agraph (int64[s] ids) => (float[s, 64] y) { h = Gather (W, ids)\n y = Tanh (h) }", W=weights(1, 64, 64)
    )
    source.graph.input[0].type.tensor_type.ClearField("shape")
    source.graph.output[0].type.tensor_type.ClearField("shape")
    assert left_alone(source) == "the rank of the indices is unknown"


def test_weights_in_functions() -> None:
    source = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        agraph (float[m, 32] x) => (float[m, 32] y) { y = local.f (x) }
        <domain: "local", opset_import: ["" : 21]>
        f (x) => (y) { W = Constant <value_float = 1.0> ()
            y = MatMul (x, W) }
    """)
    constant = source.functions[0].node[0]
    del constant.attribute[:]
    constant.attribute.append(helper.make_attribute("value", numpy_helper.from_array(weights(1, 32, 32))))
    assert "inside of a model-local function" in left_alone(source, "local::f/W")


def test_weights_in_constant_nodes() -> None:
    source = proto("agraph (float[m, 32] x) => (float[m, 32] y) { c = Cast <to = 1> (x)\n y = Add (x, c) }")
    node = source.graph.node[0]
    node.CopyFrom(helper.make_node("Constant", [], ["W"], value=numpy_helper.from_array(weights(1, 32, 32), "W")))
    source.graph.node[1].CopyFrom(helper.make_node("MatMul", ["x", "W"], ["y"]))
    assert "Constant node" in left_alone(source)


# bad weights


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_is_not_finite_is_named(bad: float, transposed: bool) -> None:
    weight = weights(1, 64, 48)
    weight[5, 7] = bad
    text = PRODUCT.replace("K]", "64]").replace("N]", "48]")
    if transposed:
        text = text.replace("MatMul (x, W)", "Gemm <transB = 1> (x, W)")
        weight = np.ascontiguousarray(weight.T)
    model, _ = quantize(proto(text, W=weight), min_elements=0)
    with pytest.raises(ModelError) as caught:
        model.to_proto()
    assert "1 NaN or infinite values" in caught.value.what
    assert str([7, 5] if transposed else [5, 7]) in caught.value.what
    assert caught.value.where == "tensor 'W'"


def test_options_that_target_bits_would_override_are_refused() -> None:
    with pytest.raises(UsageError, match="embedding_bits would not count") as caught:
        QuantizeWeights(target_bits=4.5, embedding_bits=4)
    assert "target_bits=0" in (caught.value.todo or "")
    QuantizeWeights(target_bits=4.5, embedding_bits=0)  # to leave a table alone is another matter
