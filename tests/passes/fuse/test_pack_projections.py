"""Products of one tensor packed into one: the same numbers, nothing stored twice, and the reasons of those left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from block_models import model_of, proto, run, skipped, weights
from onnx import numpy_helper

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline

K, NQ, NKV = 64, 64, 32

QKV = f"""
    agraph (float[b, s, {K}] x) => (float[b, s, {NQ}] q, float[b, s, {NKV}] k, float[b, s, {NKV}] v) {{
        q = MatMul (x, Wq)
        k = MatMul (x, Wk)
        v = MatMul (x, Wv)
    }}
"""
BIASED = f"""
    agraph (float[b, s, {K}] x) => (float[b, s, {NQ}] q, float[b, s, {NKV}] k, float[b, s, {NKV}] v) {{
        q0 = MatMul (x, Wq)
        k0 = MatMul (x, Wk)
        v0 = MatMul (x, Wv)
        q = Add (q0, Bq)
        k = Add (Bk, k0)
        v = Add (v0, Bv)
    }}
"""


def qkv(text: str = QKV, opset: int = 21, dtype: object = np.float32, **more: np.ndarray) -> onnx.ModelProto:
    made = {"Wq": weights(1, K, NQ, dtype=dtype), "Wk": weights(2, K, NKV, dtype=dtype), **more}
    made.setdefault("Wv", weights(3, K, NKV, dtype=dtype))
    return proto(text, opset, 10 if opset >= 21 else 8, **made)


BIASES = {"Bq": weights(4, NQ), "Bk": weights(5, NKV), "Bv": weights(6, NKV)}


def packed(source: onnx.ModelProto, passes: str = "pack_projections{float_products=2}") -> tuple[Model, PassRecord]:
    model = model_of(source)
    records = Pipeline(passes).run(model)
    return model, next(record for record in records if record.name == "pack_projections")


def ops(model: Model) -> Counter[str]:
    return Counter(node.op for node in model.graph.nodes)


def same(source: onnx.ModelProto, model: Model, tolerance: float = 0.0) -> None:
    x = {"x": np.random.default_rng(9).standard_normal((2, 3, K)).astype(np.float32)}
    for name in [o.name for o in source.graph.output]:
        np.testing.assert_allclose(_output(source, x, name), _output(model.to_proto(), x, name), 0, tolerance)


def _output(model: onnx.ModelProto, feeds: dict[str, np.ndarray], name: str) -> np.ndarray:
    one = onnx.ModelProto()
    one.CopyFrom(model)
    wanted = next(o for o in model.graph.output if o.name == name)
    del one.graph.output[:]
    one.graph.output.append(wanted)
    return run(one, feeds)


#: A matrix product may add its K terms in another order when it has more columns; values are about sqrt(K) = 8.
REORDERED = 8 * K * float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_query_key_and_value(opset: int) -> None:
    source = qkv(opset=opset)
    model, record = packed(source)
    assert ops(model) == {"MatMul": 1, "Split": 1}
    assert record.changed == 1
    assert not record.skipped
    same(source, model, REORDERED)


def test_names_and_order_of_outputs_survive() -> None:
    model, _ = packed(qkv())
    assert [t.name for t in model.graph.outputs] == ["q", "k", "v"]
    (split,) = (node for node in model.graph.nodes if node.op == "Split")
    assert [t.name for t in split.outputs] == ["q", "k", "v"]


def test_biases_are_packed_with_their_products() -> None:
    source = qkv(BIASED, **BIASES)
    model, _ = packed(source)
    assert ops(model) == {"MatMul": 1, "Add": 1, "Split": 1}
    same(source, model, REORDERED)


def test_one_product_without_a_bias_leaves_the_biases_behind() -> None:
    """Whisper's keys have no bias."""
    text = BIASED.replace("k0 = MatMul (x, Wk)", "k = MatMul (x, Wk)").replace("k = Add (Bk, k0)", "")
    source = qkv(text, Bq=BIASES["Bq"], Bv=BIASES["Bv"])
    model, _ = packed(source)
    assert ops(model) == {"MatMul": 1, "Add": 2, "Split": 1}
    same(source, model, REORDERED)


@pytest.mark.parametrize("shape", [(1,), (1, 1, NQ), ()], ids=str)
def test_an_addition_that_is_no_bias_stays(shape: tuple[int, ...]) -> None:
    source = qkv(BIASED, **{**BIASES, "Bq": np.ones(shape, np.float32)})
    model, _ = packed(source)
    assert ops(model) == {"MatMul": 1, "Add": 3, "Split": 1}
    same(source, model, REORDERED)


def test_a_product_that_is_an_output_itself_keeps_its_addition() -> None:
    text = BIASED.replace("=> (", f"=> (float[b, s, {NQ}] q0, ")
    source = qkv(text, **BIASES)
    model, _ = packed(source)
    assert ops(model) == {"MatMul": 1, "Add": 3, "Split": 1}
    same(source, model, REORDERED)


def test_double_precision_stays_double() -> None:
    """Also of the bias, which a careless constant would make float32."""
    source = qkv(
        BIASED.replace("float[", "double["), dtype=np.float64, **{k: v.astype(np.float64) for k, v in BIASES.items()}
    )
    model, _ = packed(source)
    x = {"x": np.random.default_rng(9).standard_normal((2, 3, K))}
    np.testing.assert_allclose(_output(model.to_proto(), x, "k"), _output(source, x, "k"), 1e-12)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lowering", ["lower_ort_cpu", "lower_portable"])
def test_few_bit_weights_keep_their_numbers(bits: int, lowering: str, tmp_path: Path) -> None:
    quantize = f"quantize_weights{{bits={bits}, min_elements=0, sensitive_bits={bits}, lm_head_bits={bits}}}"
    source = qkv(BIASED, **BIASES)
    alone, together = model_of(source), model_of(source)
    Pipeline(f"{quantize}, {lowering}").run(alone)
    Pipeline(f"{quantize}, pack_projections, {lowering}").run(together)
    product = "MatMulNBits" if lowering == "lower_ort_cpu" else "MatMul"
    assert ops(alone)[product] == 3
    assert ops(together)[product] == 1
    save_model(together, tmp_path / "m.onnx")
    x = {"x": np.random.default_rng(9).standard_normal((2, 3, K)).astype(np.float32)}
    for name in ("q", "k", "v"):
        np.testing.assert_allclose(
            _output(onnx.load(tmp_path / "m.onnx"), x, name), _output(alone.to_proto(), x, name), 0, REORDERED
        )
    assert together.weight_bytes() <= alone.weight_bytes() + 64  # the sizes of the split are new


def test_values_of_more_bits_stay_alone() -> None:
    scope = '{match = "Wv", bits = 8}'
    quantize = f"quantize_weights{{bits=4, sensitive_bits=4, lm_head_bits=4, min_elements=0, scopes=[{scope}]}}"
    model, record = packed(qkv(), f"{quantize}, pack_projections")
    assert ops(model) == {"BlockMatMul": 2, "Split": 1}
    (reason,) = skipped(record).values()
    assert "8 bits" in reason
    assert "4 bits" in reason


def test_weights_are_streamed_not_computed(tmp_path: Path) -> None:
    source, inline = qkv(), qkv()
    onnx.save(source, tmp_path / "s.onnx", save_as_external_data=True, size_threshold=0, location="s.data")
    model = open_model(tmp_path / "s.onnx")
    Pipeline("pack_projections").run(model)
    save_model(model, tmp_path / "m.onnx")
    (weight,) = (t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if len(t.dims) == 2)
    wanted = np.concatenate([numpy_helper.to_array(t) for t in inline.graph.initializer], 1)
    np.testing.assert_array_equal(numpy_helper.to_array(weight), wanted)


# --- skips when ---


def test_different_element_types() -> None:
    text = QKV.replace("v = MatMul (x, Wv)", "h = Cast <to = 10> (x)\n v16 = MatMul (h, Wv)\n v = Cast <to = 1> (v16)")
    model, _ = packed(qkv(text, Wv=weights(3, K, NKV, dtype=np.float16)))
    assert ops(model)["MatMul"] == 2, "they do not read the same tensor"


def test_a_weight_that_is_used_elsewhere() -> None:
    text = QKV.replace("v = MatMul (x, Wv)", "v = MatMul (x, Wv)\n e = Gather (Wv, i)").replace(
        "=> (", f"=> (float[1, {NKV}] e, "
    )
    model, record = packed(qkv(text, i=np.zeros(1, np.int64)))
    assert ops(model)["MatMul"] == 2
    assert "used elsewhere" in next(iter(skipped(record).values()))


def test_two_products_of_one_weight() -> None:
    model, record = packed(qkv(QKV.replace("Wv)", "Wk)")))
    assert ops(model) == {"MatMul": 3}
    assert all("used elsewhere" in reason for reason in skipped(record).values())
    assert len(record.skipped) == 2


def test_a_few_bit_weight_that_is_used_elsewhere() -> None:
    model, record = packed(qkv(QKV.replace("Wv)", "Wk)")), "quantize_weights{min_elements=0}, pack_projections")
    assert ops(model) == {"BlockMatMul": 3}
    assert all("used elsewhere" in reason for reason in skipped(record).values())


def test_a_weight_that_is_an_output_or_an_input() -> None:
    text = QKV.replace("=> (", f"=> (float[{K}, {NKV}] Wv, ")
    model, record = packed(qkv(text))
    assert ops(model)["MatMul"] == 2
    assert "graph input or output" in next(iter(skipped(record).values()))
    text = QKV.replace("(float[b, s, 64] x)", f"(float[b, s, 64] x, float[{K}, {NKV}] Wv)")
    model, record = packed(qkv(text))
    assert ops(model)["MatMul"] == 2


def test_a_sparse_weight() -> None:
    source = qkv()
    dense = next(t for t in source.graph.initializer if t.name == "Wv")
    source.graph.initializer.remove(dense)
    values = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "Wv")
    indices = numpy_helper.from_array(np.array([3, 40], np.int64), "places")
    source.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [K, NKV]))
    model, record = packed(source)
    assert ops(model)["MatMul"] == 2
    assert "sparse" in next(iter(skipped(record).values()))


def test_codes_of_a_model_that_was_saved_half_way() -> None:
    model, _ = packed(
        qkv(), "quantize_weights{min_elements=0, sensitive_bits=4, lm_head_bits=4}, pack_projections{quantized=false}"
    )
    again, record = packed(model.to_proto())
    assert ops(again)["BlockMatMul"] == 3
    assert set(skipped(record).values()) == {"its codes are no recorded work"}


def test_columns_that_fill_no_group() -> None:
    text = QKV.replace(f"float[b, s, {NKV}] v", "float[b, s, 24] v")
    quantize = "quantize_weights{min_elements=0, sensitive_bits=4, lm_head_bits=4}"
    model, record = packed(qkv(text, Wv=weights(3, K, 24)), f"{quantize}, pack_projections")
    assert ops(model) == {"BlockMatMul": 2, "Split": 1}
    assert "24 columns" in next(iter(skipped(record).values()))


def test_two_float_products_are_as_fast_alone() -> None:
    source = qkv(QKV.replace("v = MatMul (x, Wv)", "").replace(f", float[b, s, {NKV}] v", ""))
    source.graph.initializer.remove(next(t for t in source.graph.initializer if t.name == "Wv"))
    model, record = packed(source, "pack_projections")
    assert ops(model) == {"MatMul": 2}
    assert "2 float products" in next(iter(skipped(record).values()))
    model, _ = packed(source)
    assert ops(model) == {"MatMul": 1, "Split": 1}
    model, _ = packed(source, "quantize_weights{min_elements=0}, pack_projections")
    assert ops(model) == {"BlockMatMul": 1, "Split": 1}


@pytest.mark.parametrize(("option", "quantize"), [("floats", ""), ("quantized", "quantize_weights{min_elements=0}, ")])
def test_switched_off(option: str, quantize: str) -> None:
    model, record = packed(qkv(), f"{quantize}pack_projections{{{option}=false}}")
    assert "Split" not in ops(model)
    assert set(skipped(record).values()) == {f"{option} = false"}


def test_a_vector_or_a_batch_of_matrices_is_no_projection() -> None:
    text = QKV.replace(f"float[b, s, {NKV}] k,", "float[b, s] k,").replace(
        f"float[b, s, {NKV}] v", f"float[b, s, {NKV}] v"
    )
    model, _ = packed(qkv(text, Wk=weights(2, K), Wv=weights(3, 1, K, NKV)))
    assert ops(model) == {"MatMul": 3}


def test_products_in_a_subgraph() -> None:
    text = f"""
    agraph (bool c, float[b, s, {K}] x) => (float[b, s, {NQ}] y) {{
        y = If (c) <then_branch = t () => (float[b, s, {NQ}] yt) {{
            q = MatMul (x, Wq)
            k = MatMul (x, Wk)
            yt = Add (q, k)
        }}, else_branch = e () => (float[b, s, {NQ}] ye) {{ ye = Relu (x) }}>
    }}
    """
    source = proto(text, Wq=weights(1, K, NQ), Wk=weights(2, K, NQ))
    model, record = packed(source)
    assert record.changed == 1
    feeds = {"c": np.array(True), "x": np.random.default_rng(9).standard_normal((2, 3, K)).astype(np.float32)}
    np.testing.assert_allclose(run(model.to_proto(), feeds), run(source, feeds), 0, 2 * REORDERED)


def test_an_option_that_makes_no_sense() -> None:
    with pytest.raises(UsageError, match="2 or more"):
        Pipeline("pack_projections{float_products=1}")
