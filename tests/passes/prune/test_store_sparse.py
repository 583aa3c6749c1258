"""`store_sparse`: fewer bytes, the same results, and a model that everybody opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from block_models import model_of, product, proto, run, skipped, weights
from onnx import TensorProto, numpy_helper

from onnxslim_llm.custom_ops import ops, packed, sparse
from onnxslim_llm.custom_ops.packed import PackedScheme
from onnxslim_llm.custom_ops.packing import pack_bits
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.ir.weights import SparseWeight, weight_of
from onnxslim_llm.passes.prune.prune_weights import PruneWeights
from onnxslim_llm.passes.prune.store_sparse import StoreSparse
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.targets import get_target

K, N = 128, 96


def thinned(zeros: float, dtype: type = np.float32) -> onnx.ModelProto:
    """A product with a weight that has so many zeros."""
    weight = weights(1, K, N, dtype=dtype)
    weight.reshape(-1)[np.random.default_rng(0).permutation(weight.size)[: round(weight.size * zeros)]] = 0
    text = "agraph (float[m, 128] x) => (float[m, 96] y) { y = MatMul (x, W) }"
    return proto(text if dtype == np.float32 else text.replace("float[", "float16["), W=weight)


@pytest.mark.parametrize(
    ("dtype", "zeros", "pays"),
    [(np.float32, 0.66, False), (np.float32, 0.68, True), (np.float16, 0.79, False), (np.float16, 0.81, True)],
)
def test_it_pays_above_the_break_even(tmp_path: Path, dtype: type, zeros: float, pays: bool) -> None:
    source = thinned(zeros, dtype)
    model = model_of(source)
    (record,) = Pipeline([StoreSparse()]).run(model)
    assert bool(record.changed) == pays
    if not pays:
        assert "and it pays above" in skipped(record)["W"]
        return
    save_model(model, tmp_path / "sparse.onnx")
    proto = onnx.load(tmp_path / "sparse.onnx")
    onnx.checker.check_model(proto)  # shape inference of onnx 1.23 knows no products with sparse tensors
    assert [s.values.name for s in proto.graph.sparse_initializer] == ["W"]
    assert not proto.graph.initializer
    (entry,) = record.detail["tensors"]
    stored = proto.graph.sparse_initializer[0]
    assert entry["sparse_bytes"] == len(stored.values.raw_data) + len(stored.indices.raw_data)
    assert proto.ByteSize() < source.ByteSize()
    feeds = {"x": weights(3, 5, K, dtype=dtype)}
    np.testing.assert_array_equal(run(tmp_path / "sparse.onnx", feeds), run(source, feeds))


def test_half_the_weights_in_three_of_four_places(tmp_path: Path) -> None:
    """The way from dense to sparse and back: pruned, stored, opened, cleaned up and saved again."""
    text = "agraph (float[m, 128] x) => (float[m, 96] y) { h = MatMul (x, W) y = MatMul (h, V) }"
    source = proto(text, W=weights(1, K, N), V=weights(2, N, N))
    model = model_of(source)
    Pipeline([PruneWeights(0.75, method="magnitude"), StoreSparse()]).run(model)
    assert isinstance(weight_of(model.graph.tensors()["W"]), SparseWeight)
    first = save_model(model, tmp_path / "first.onnx").bytes
    again = open_model(tmp_path / "first.onnx")
    Pipeline("cleanup").run(again)
    assert isinstance(weight_of(again.graph.tensors()["W"]), SparseWeight)
    assert save_model(again, tmp_path / "second.onnx").bytes <= first
    feeds = {"x": weights(3, 5, K)}
    np.testing.assert_array_equal(run(tmp_path / "first.onnx", feeds), run(tmp_path / "second.onnx", feeds))


def test_a_wanted_saving_is_asked_for() -> None:
    (record,) = Pipeline([StoreSparse(min_saving=0.5)]).run(model_of(thinned(0.7)))
    assert not record.changed
    with pytest.raises(UsageError, match="min_saving"):
        StoreSparse(min_saving=1.5)


def test_dense_and_small_weights_stay_as_they_are() -> None:
    model = model_of(product(K, N))
    (record,) = Pipeline([StoreSparse()]).run(model)
    assert skipped(record) == {"W": "0.0% zeros, and it pays above 66.7%"}
    (record,) = Pipeline([StoreSparse(min_elements=10**6)]).run(model)
    assert not record.skipped


def packed_product(zeros: float, bits: int = 4) -> tuple[onnx.ModelProto, np.ndarray]:
    """A product of ours with so many codes of 0, and its weight."""
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 2**bits, (N, K // 32, 32), np.uint8) + np.uint8(2 ** (bits - 1))
    codes = np.where(rng.random(codes.shape) < zeros, 2 ** (bits - 1), codes & (2**bits - 1)).astype(np.uint8)
    scales = (0.01 + 0.01 * rng.random((N, K // 32))).astype(np.float16)
    weight = packed.pack(PackedScheme(K, N, bits), pack_bits(codes, bits), scales, None)
    text = f"""<ir_version: 8, opset_import: ["": 17, "onnxslim_llm.ops": 1]>
    agraph (float[m, 128] x) => (float[m, 96] y) {{
        y = onnxslim_llm.ops.MatMulPacked <K = {K}, N = {N}, bits = {bits}, block_size = 32> (x, B)
    }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(weight, "B"))
    return model, weight


@pytest.mark.parametrize(
    ("bits", "zeros", "pays"), [(4, 0.2, False), (4, 0.32, True), (8, 0.08, False), (8, 0.2, True)]
)
def test_codes_with_a_bitmap_pay_above_the_break_even(bits: int, zeros: float, pays: bool) -> None:
    source, weight = packed_product(zeros, bits)
    model = model_of(source)
    (record,) = Pipeline([StoreSparse()]).run(model)
    assert bool(record.changed) == pays
    if not pays:
        assert f"and it pays above {1 / bits:.1%}" in skipped(record)["B"]
        return
    made = weight_of(model.graph.tensors()["B"]).view()
    np.testing.assert_array_equal(sparse.expand(made), weight)
    (entry,) = record.detail["tensors"]
    assert entry["form"] == f"bitmap, {bits} bits"
    assert (entry["dense_bytes"], entry["sparse_bytes"]) == (weight.size, made.size)
    assert entry["zeros"] == pytest.approx(zeros, abs=0.02)
    assert record.detail["break_even"] == {
        "coo, float32": 0.6667, "coo, float16": 0.8, "bitmap, 4 bits": 0.25, "bitmap, 8 bits": 0.125,
    }  # fmt: skip
    (again,) = Pipeline([StoreSparse()]).run(model)
    assert not again.changed


def test_codes_with_a_bitmap_give_the_same_results(tmp_path: Path) -> None:
    source, _ = packed_product(0.6)
    model = model_of(source)
    Pipeline([StoreSparse()]).run(model)
    save_model(model, tmp_path / "sparse.onnx")
    ops.register_schemas()
    onnx.checker.check_model(onnx.load(tmp_path / "sparse.onnx"), full_check=True)
    feeds = {"x": weights(3, 5, K)}
    results = []
    for file in (source.SerializeToString(), str(tmp_path / "sparse.onnx")):
        options = onnxruntime.SessionOptions()
        ops.register(options)
        results.append(onnxruntime.InferenceSession(file, options).run(None, feeds)[0])
    np.testing.assert_array_equal(*results)


def test_tables_that_are_looked_up_stay_dense() -> None:
    source, _ = packed_product(0.6)
    source.graph.input.append(onnx.helper.make_tensor_value_info("i", TensorProto.INT64, ["t"]))
    source.graph.output.append(onnx.helper.make_tensor_value_info("e", TensorProto.FLOAT, ["t", K]))
    attributes = {"K": K, "N": N, "bits": 4, "block_size": 32}
    source.graph.node.append(onnx.helper.make_node("GatherPacked", ["B", "i"], ["e"], domain=ops.DOMAIN, **attributes))
    (record,) = Pipeline([StoreSparse()]).run(model_of(source))
    assert skipped(record) == {"B": "rows of it are looked up, too"}


def test_narrow_codes_stay_dense() -> None:
    (record,) = Pipeline([StoreSparse()]).run(model_of(packed_product(0.9, bits=3)[0]))
    assert skipped(record) == {"B": "codes of 3 bits have no sparse form"}


@pytest.mark.parametrize("target", ["ort-cpu", "portable"])
def test_codes_with_a_bitmap_can_be_lowered_to_other_targets(target: str) -> None:
    source, _ = packed_product(0.6)
    feeds = {"x": weights(3, 5, K)}
    results = []
    for passes in ([], [StoreSparse()]):
        model = model_of(source)
        Pipeline(passes).run(model)
        context = Context(target=get_target(target))
        Pipeline(get_target(target).lowering).run(model, context)
        results.append(run(model.to_proto(), feeds))
    np.testing.assert_array_equal(*results)


def test_another_compile_for_the_same_target_leaves_them_sparse() -> None:
    model = model_of(packed_product(0.6)[0])
    Pipeline([StoreSparse()]).run(model)
    before = weight_of(model.graph.tensors()["B"]).view()
    record, *_ = Pipeline("raise_block_weights").run(model, Context(target=get_target("ort-cpu-ops")))
    assert [skip.reason for skip in record.skipped] == ["it is stored sparse, as the target takes it"]
    np.testing.assert_array_equal(weight_of(model.graph.tensors()["B"]).view(), before)


def test_damaged_weights_are_left_alone() -> None:
    for damaged, reason in (
        (lambda data: data[:-1], "the packed weight has"),
        (lambda data: data.astype(np.float32), "it is no string of bytes, as packed weights are"),
    ):
        source, weight = packed_product(0.6)
        source.graph.initializer[0].CopyFrom(numpy_helper.from_array(damaged(weight), "B"))
        (record,) = Pipeline([StoreSparse()]).run(model_of(source))
        assert not record.changed
        assert skipped(record)["B"].startswith(reason)
