"""The group as a whole: a fixpoint, on real decoders, random graphs and models that are quantized already."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cleanup.torchscript_decoder import Sizes, build
from cleanup.torchscript_decoder import feeds as decoder_feeds
from cleanup_graphs import apply, assert_same_results, graph, initializers, model_of, ops, run
from onnx import TensorProto, helper
from random_graphs import random_graph

from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.passes.cleanup.cleanup import Cleanup
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline

SEEDS = 40


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_graphs(seed: int) -> None:
    before = random_graph(seed)
    after, change = apply(Cleanup(), before)
    assert change
    assert after.ByteSize() < before.ByteSize()
    left = ops(after)
    assert sum(left.values()) < sum(ops(before).values())
    # What the generator scatters and what is always found again.
    for op in ("Constant", "Shape", "Where", "Expand", "Equal"):
        assert not left[op], op


STEPS = [(1, 5, 0), (2, 3, 4), (2, 1, 7)]


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    return build(Sizes())


def test_a_decoder_as_torchscript_writes_it(decoder: onnx.ModelProto) -> None:
    model = model_of(decoder)
    change = Cleanup().apply(model, Context())
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    for batch, tokens, past in STEPS:
        assert_same_results(decoder, after, decoder_feeds(Sizes(), batch, tokens, past))
    left, layers = ops(after), Sizes().layers
    assert not {"Constant", "ConstantOfShape", "Equal"} & left.keys()
    assert left["Where"] == 1  # the mask
    assert left["Shape"] == left["Gather"] - 1 == 3  # of the mask; the other Gather is the embedding
    assert left["Expand"] == 2 * layers
    targets = {n.op_type: initializers(after)[n.input[1]].tolist() for n in after.graph.node if n.op_type == "Expand"}
    assert targets == {"Expand": [1, 1, 2, 1, 1]}
    assert change.detail["sites"]["tie_weights"] == 1
    assert "onnx::MatMul_lm_head" not in initializers(after)


def test_cleaning_up_what_is_clean_changes_nothing(decoder: onnx.ModelProto, tmp_path: Path) -> None:
    model = model_of(decoder)
    Cleanup().apply(model, Context())
    save_model(model, tmp_path / "once.onnx", SaveOptions(jobs=1))
    again = open_model(tmp_path / "once.onnx")
    change = Cleanup().apply(again, Context())
    assert not change
    save_model(again, tmp_path / "twice.onnx", SaveOptions(jobs=1))
    assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "twice.onnx").read_bytes()


def test_the_sample_model(sample_dir: Path) -> None:
    before = onnx.load(sample_dir / "model.onnx")
    model = open_model(sample_dir / "model.onnx")
    Cleanup().apply(model, Context())
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert len(after.graph.node) < 0.5 * len(before.graph.node)
    assert after.ByteSize() < before.ByteSize()
    again = model_of(after)
    assert not Cleanup().apply(again, Context())
    cache = [v for v in before.graph.input if v.name.startswith("past_key_values")]
    dims = [d.dim_value for d in cache[0].type.tensor_type.shape.dim]
    sizes = Sizes(layers=len(cache) // 2, hidden=dims[3], heads=1, kv_heads=dims[1], vocab=100)
    for batch, tokens, past in STEPS:
        assert_same_results(before, after, decoder_feeds(sizes, batch, tokens, past))


# --- models that are quantized already --------------------------------------------------------------------------------


def quantized(text: str, opset: int, **more: np.ndarray) -> onnx.ModelProto:
    return graph(text, opset, 10, **more)


def test_qdq_passes_through() -> None:
    text = """
        g (float[N, 4] x) => (float[N, 4] y) {
            q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)
            w = DequantizeLinear <axis = 1> (k, t)  v = DequantizeLinear <axis = 1> (k, t)
            m = MatMul (d, w)  n = MatMul (m, v)
            r = QuantizeLinear (n, s, z)  y = DequantizeLinear (r, s, z)
        }"""
    more = {
        "s": np.array(0.1, np.float32),
        "z": np.array(3, np.uint8),
        "k": np.arange(16, dtype=np.int8).reshape(4, 4),
        "t": np.full(4, 0.01, np.float32),
    }
    after, change = apply(Cleanup(), quantized(text, 17, **more))
    assert not change
    assert ops(after)["DequantizeLinear"] == 4


def test_four_bit_blocks_behind_a_transpose_pass_through() -> None:
    text = """
        g (float[N, 32] x) => (float[N, 16] y) {
            d = DequantizeLinear <axis = 1, block_size = 16> (k, t)
            w = Transpose <perm = [1, 0]> (d)
            y = MatMul (x, w)
        }"""
    codes = np.random.default_rng(0).integers(-8, 8, (16, 32))
    proto = quantized(text, 21, k=codes.astype(np.int8), t=np.full((16, 2), 0.1, np.float32))
    proto.graph.initializer[0].CopyFrom(helper.make_tensor("k", TensorProto.INT4, codes.shape, codes.reshape(-1)))
    after, change = apply(Cleanup(), proto)
    assert not change
    assert after.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)


def test_matmul_n_bits_passes_through() -> None:
    random = np.random.default_rng(0)
    codes, scales = random.integers(0, 256, (16, 2, 8), np.uint8), random.random((16, 2)).astype(np.float32)
    text = """
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[N, 32] x) => (float[N, 16] y) {
            m = com.microsoft.MatMulNBits <K = 32, N = 16, bits = 4, block_size = 16> (x, codes, scales)
            n = com.microsoft.MatMulNBits <K = 32, N = 16, bits = 4, block_size = 16> (x, codes2, scales)
            y = Add (m, n)
        }"""
    proto = graph(text, codes=codes, scales=scales, codes2=codes)
    after, change = apply(Cleanup(), proto)
    assert change.sites == ["codes2"]  # stored twice, that is all
    assert ops(after) == {"MatMulNBits": 2, "Add": 1}


def test_sparse_weights_pass_through() -> None:
    proto = graph(
        "g (float[N, 4] x) => (float[N, 4] y) { m = MatMul (x, w)  y = Identity (m) }", w=np.eye(4, dtype=np.float32)
    )
    del proto.graph.initializer[:]
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [2.0, 3.0])
    indices = helper.make_tensor("at", TensorProto.INT64, [2], [1, 14])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    after, _ = apply(Cleanup(), proto)
    assert ops(after) == {"MatMul": 1}
    kept, given = after.graph.sparse_initializer[0], proto.graph.sparse_initializer[0]
    assert kept.SerializeToString() == given.SerializeToString()


# --- what people wrote into the model ---------------------------------------------------------------------------------


def test_metadata_and_names_of_what_is_still_there() -> None:
    text = """
        g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}, float one = {1.0}> {
            a = Mul (x, one)
            b = Mul (a, w)
            y = Relu (b)
        }"""
    proto = graph(text)
    proto.metadata_props.add(key="model", value="m")
    proto.graph.metadata_props.add(key="graph", value="g")
    for node in proto.graph.node:
        node.name = f"node_{node.output[0]}"
        node.doc_string = f"makes {node.output[0]}"
        node.metadata_props.add(key="node", value=node.output[0])
    proto.graph.initializer[0].metadata_props.add(key="tensor", value="w")
    proto.graph.quantization_annotation.add(tensor_name="b")
    after, _ = apply(Cleanup(), proto)
    assert [p.value for p in after.metadata_props] == ["m"]
    assert [p.value for p in after.graph.metadata_props] == ["g"]
    assert [(n.name, n.doc_string, n.metadata_props[0].value) for n in after.graph.node] == [
        ("node_b", "makes b", "b"),
        ("node_y", "makes y", "y"),
    ]
    assert after.graph.initializer[0].metadata_props[0].value == "w"
    assert after.graph.quantization_annotation[0].tensor_name == "b"


def test_names_in_the_account() -> None:
    model = model_of(
        graph("g (float[N] x) => (float[N] y) { c = Constant <value_float = 1.0> ()  a = Mul (x, c)  y = Exp (a) }")
    )
    (record,) = Pipeline("cleanup").run(model)
    assert record.nodes == (3, 1)
    assert record.detail["sites"] == {"lift_constants": 1, "simplify_algebra": 1}
    assert record.detail["rounds"] == 2


def test_passes_that_undo_each_other_are_a_bug() -> None:
    model = model_of(
        graph("g (float[N] x) => (float[N] y) { c = Constant <value_float = 1.0> ()  a = Mul (x, c)  y = Exp (a) }")
    )
    with pytest.raises(CompilerBug, match="do not come to an end after 1 rounds"):
        Cleanup(max_rounds=1).apply(model, Context())


def test_outputs_that_are_inputs_or_constants() -> None:
    text = "g (float[N] x) => (float[N] y, float c) { y = Identity (x)  c = Constant <value_float = 2.0> () }"
    proto = graph(text)
    after, change = apply(Cleanup(), proto)
    assert not change
    assert run(after, {"x": np.ones(2, np.float32)})["c"] == 2
