from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import PRODUCT, fused, model_of, product, proto, run, skipped, tied, weights
from lowering_checks import FLOAT_TOLERANCE, HALF_TOLERANCE, assert_close, compile_to, expected_of
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxslim_llm.errors import CompilerBug, UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.passes.lower.weights.lower_portable import LowerPortable
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.targets.portable import PORTABLE

#: Blocks of 16 for the table, so that there are enough scales.
NARROW = ({"match": "E", "block": 16},)
IDS = {"ids": np.array([[0, 5, -1], [7, 7, -3]], np.int64)}
#: int8 activations: each is off by at most half of 1/127 of the largest one of its block.
HALF_STEP = 0.5 / 127


def compiled(source: onnx.ModelProto, folder: Path, **options: Any) -> Path:
    path = folder / "model.onnx"
    compile_to(PORTABLE, LowerPortable(), source, path, **options)
    return path


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(128, 48, 32), (70, 33, 16), (47, 17, 0), (128, 64, 0), (96, 64, 64), (256, 32, 256)]
)
def test_products_are_exact_and_fused(
    tmp_path: Path, bits: int, symmetric: bool, rows: int, columns: int, block: int
) -> None:
    source = product(rows, columns)
    path = compiled(source, tmp_path, bits=bits, lm_head_bits=bits, block=block, symmetric=symmetric)
    feeds = {"x": weights(9, 3, rows)}
    expected = run(expected_of(source, set(), {"W": bits}, block, symmetric), feeds)
    assert_close(run(path, feeds), expected, FLOAT_TOLERANCE)
    assert_close(run(path, feeds, optimise=True), expected, FLOAT_TOLERANCE)
    assert fused(path, tmp_path) == {"MatMulNBits": 1}


def test_the_runtimes_default_rounds_activations_to_int8(tmp_path: Path) -> None:
    source = product(64, 32)
    path = compiled(source, tmp_path, lm_head_bits=4)
    feeds = {"x": weights(9, 3, 64)}
    near = expected_of(source, set(), {"W": 4}, 32, True)
    weight = np.abs(numpy_helper.to_array(near.graph.initializer[0]))
    bound = HALF_STEP * np.abs(feeds["x"]).max() * weight.sum(axis=0).max()
    difference = np.abs(run(path, feeds, optimise=True, exact=False) - run(near, feeds)).max()
    assert 0 < difference <= bound


def test_two_bits(tmp_path: Path) -> None:
    source = product(64, 32, opset=25)
    path = compiled(source, tmp_path, bits=2, lm_head_bits=2)
    feeds = {"x": weights(9, 3, 64)}
    assert_close(run(path, feeds), run(expected_of(source, set(), {"W": 2}, 32, True), feeds), FLOAT_TOLERANCE)
    assert fused(path, tmp_path) == {"MatMulNBits": 1}


@pytest.mark.parametrize("rank", [2, 3])
def test_gemm_and_bias_are_fused(tmp_path: Path, rank: int) -> None:
    lead = "m" if rank == 2 else "b, m"
    text = f"agraph (float[{lead}, 64] x) => (float[{lead}, 32] y) {{ p = MatMul (x, W)\n y = Add (p, b) }}"
    if rank == 2:
        text = "agraph (float[m, 64] x) => (float[m, 32] y) { y = Gemm <transB = 1> (x, W, b) }"
    weight = weights(1, 32, 64) if rank == 2 else weights(1, 64, 32)
    source = proto(text, W=weight, b=weights(4, 32))
    path = compiled(source, tmp_path, lm_head_bits=4)
    feeds = {"x": weights(9, *([2] * (rank - 1)), 64)}
    expected = run(expected_of(source, {"W"} if rank == 2 else set(), {"W": 4}, 32, True), feeds)
    assert_close(run(path, feeds, optimise=True), expected, FLOAT_TOLERANCE)
    assert fused(path, tmp_path) == {"MatMulNBits": 1}


@pytest.mark.parametrize(("vocab", "width"), [(96, 64), (98, 70), (40, 33)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 0])
def test_tied_tables(tmp_path: Path, vocab: int, width: int, symmetric: bool, bits: int, block: int) -> None:
    source = tied(vocab, width)
    options: dict[str, Any] = {"embedding_bits": bits, "lm_head_bits": bits, "symmetric": symmetric, "block": block}
    path = compiled(source, tmp_path, **options)
    expected = run(expected_of(source, {"E"}, {"E": bits, "W": 4}, block, symmetric), IDS)
    assert_close(run(path, IDS), expected, FLOAT_TOLERANCE)
    assert_close(run(path, IDS, optimise=True), expected, FLOAT_TOLERANCE)
    ops = fused(path, tmp_path)
    assert ops["MatMulNBits"] == 2
    assert ops["MatMul"] == 0


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    path = compiled(tied(512, 64), tmp_path, embedding_bits=8, lm_head_bits=8)
    # Codes and float32 scales of the table, codes and scales of the 64 x 64 product, 4 KiB for the graph and alignment
    # of each region.
    table, inner, rest = 512 * 64 * (1 + 4 / 32), 64 * 64 * (1 / 2 + 4 / 32), 5 * 4096
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < table + inner + rest
    places = Counter(
        next(e.value for e in tensor.external_data if e.key == "offset")
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.external_data
    )
    assert sorted(places.values())[-2:] == [2, 2]  # codes and scales: two initializers on the same bytes


def test_a_look_up_reads_rows_and_not_the_table(tmp_path: Path) -> None:
    path = compiled(tied(), tmp_path)
    model = open_model(path)
    for node in model.graph.nodes:
        if node.op == "DequantizeLinear" and node.outputs[0].outputs[0].op != "MatMul":
            assert node.inputs[0].inputs, "it dequantizes an initializer instead of what was gathered"


UNTIED = "agraph (int64[b, s] ids) => (float[b, s, 48] y) { h = Gather (E, ids)\n n = Tanh (h)\n y = MatMul (n, W) }"


@pytest.mark.parametrize("width", [64, 70, 33])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 0])
def test_tables_of_their_own(tmp_path: Path, width: int, symmetric: bool, bits: int, block: int) -> None:
    source = proto(UNTIED, E=weights(2, 97, width) / 2, W=weights(3, width, 48))
    path = compiled(source, tmp_path, embedding_bits=bits, lm_head_bits=4, symmetric=symmetric, block=block)
    expected = run(expected_of(source, {"E"}, {"E": bits, "W": 4}, block, symmetric), IDS)
    assert_close(run(path, IDS), expected, FLOAT_TOLERANCE)
    assert fused(path, tmp_path)["MatMulNBits"] == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 1, 2)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_indices_of_any_rank(tmp_path: Path, bits: int, shape: tuple[int, ...], dtype: Any) -> None:
    dims = ", ".join(map(str, shape))
    kind = np.dtype(dtype).name
    text = f"""agraph ({kind}[{dims}] ids) => (float[{dims}, 96] y) {{
        h = Gather (E, ids)
        T = Transpose <perm = [1, 0]> (E)
        y = MatMul (h, T)
    }}"""
    source = proto(text, E=weights(2, 96, 64))
    path = compiled(source, tmp_path, embedding_bits=bits, lm_head_bits=bits)
    feeds = {"ids": np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape) * 7 % 96, dtype)}
    expected = run(expected_of(source, {"E"}, {"E": bits}, 32, True), feeds)
    assert_close(run(path, feeds), expected, FLOAT_TOLERANCE)


def test_half_precision(tmp_path: Path) -> None:
    source = tied(dtype=np.float16)
    path = compiled(source, tmp_path, embedding_bits=4, lm_head_bits=4)
    expected = run(expected_of(source, {"E"}, {"E": 4, "W": 4}, 32, True), IDS)
    assert_close(run(path, IDS), expected, HALF_TOLERANCE)
    assert fused(path, tmp_path)["MatMulNBits"] == 2


def test_scales_in_half_precision_cost_no_fusion(tmp_path: Path) -> None:
    path = compiled(tied(512, 64), tmp_path, scale_dtype="float16", scopes=NARROW)
    near = run(path, IDS)
    assert fused(path, tmp_path)["MatMulNBits"] == 2
    whole = compiled(tied(512, 64), tmp_path, scale_dtype="activation", scopes=NARROW)
    assert_close(near, run(whole, IDS), 2**-7)  # 2^-11 of each scale, and the codes that it changes
    assert (near != run(whole, IDS)).any()


def test_a_weight_with_two_readers_is_fused_twice_and_stored_once(tmp_path: Path) -> None:
    text = "agraph (float[m, 256] x) => (float[m, 256] y) { a = MatMul (x, W)\n y = MatMul (a, W) }"
    source = proto(text, W=weights(1, 256, 256) / 16)
    path = compiled(source, tmp_path, bits=4, lm_head_bits=4)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 1.5 * 256 * 256 * 5 / 8
    assert fused(path, tmp_path) == {"MatMulNBits": 2}


def test_branches_are_fused(tmp_path: Path) -> None:
    text = """agraph (float[m, 64] x, bool c) => (float[m, 32] y) {
        y = If (c) <then_branch = a () => (float[m, 32] p) { p = MatMul (x, W) },
                    else_branch = b () => (float[m, 32] q) { r = MatMul (x, W)
                        q = Neg (r) }>
    }"""
    path = compiled(proto(text, W=weights(1, 64, 32)), tmp_path)
    assert fused(path, tmp_path)["MatMulNBits"] == 2


@pytest.mark.parametrize("options", [{}, {"embedding_bits": 4, "lm_head_bits": 4}, {"symmetric": False}, {"block": 0}])
def test_the_standards_own_evaluator_agrees(tmp_path: Path, options: dict[str, Any]) -> None:
    path = compiled(tied(), tmp_path, **options)
    reference = ReferenceEvaluator(str(path)).run(None, IDS)[0]
    assert_close(run(path, IDS, optimise=True), reference, FLOAT_TOLERANCE)


def test_nothing_but_standard_operators(tmp_path: Path) -> None:
    path = compiled(tied(), tmp_path)
    proto_ = onnx.load(path, load_external_data=False)
    assert {node.domain for node in proto_.graph.node} == {""}
    assert [(item.domain, item.version) for item in proto_.opset_import] == [("", 21)]
    assert not proto_.functions


def test_the_artifact_is_at_a_fixpoint(tmp_path: Path) -> None:
    model = open_model(compiled(tied(), tmp_path, embedding_bits=4, lm_head_bits=4))
    before = model.to_proto("omit").SerializeToString(deterministic=True)
    assert not QuantizeWeights(min_elements=0).apply(model, Context(target=PORTABLE))
    assert not LowerPortable().apply(model, Context(target=PORTABLE))
    assert model.to_proto("omit").SerializeToString(deterministic=True) == before


def test_two_compiles_give_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        compiled(tied(512, 64), folder)
    first, second = (sorted((f.name, f.read_bytes()) for f in folder.iterdir()) for folder in folders)
    assert first == second


def test_an_odd_tied_vocabulary_is_stored_twice_and_says_so(tmp_path: Path) -> None:
    source = tied(97, 64)
    path = tmp_path / "model.onnx"
    _, change = compile_to(PORTABLE, LowerPortable(), source, path, embedding_bits=4, lm_head_bits=4)
    assert skipped(change) == {"E_q4": "97 codes of 4 bits do not fill whole bytes: stored twice"}
    assert_close(run(path, IDS), run(expected_of(source, {"E"}, {"E": 4, "W": 4}, 32, True), IDS), FLOAT_TOLERANCE)


def test_a_model_that_was_saved_half_way_is_lowered_to_function_bodies(tmp_path: Path) -> None:
    source = product(64, 32, PRODUCT)
    model = model_of(source)
    QuantizeWeights(min_elements=0, lm_head_bits=4).apply(model, Context())
    reopened = model_of(model.to_proto())  # the recorded work is plain numbers now
    assert LowerPortable().apply(reopened, Context()).sites
    LowerPortable().ensures(reopened, Context())
    feeds = {"x": weights(9, 3, 64)}
    assert_close(run(reopened.to_proto(), feeds), run(model.to_proto(), feeds), FLOAT_TOLERANCE)


def test_three_bits_are_refused() -> None:
    model = model_of(product(64, 32))
    QuantizeWeights(bits=3, lm_head_bits=3, min_elements=0).apply(model, Context())
    with pytest.raises(UsageError, match="no type for 3-bit weights"):
        LowerPortable().apply(model, Context())


def test_a_concept_that_is_left_is_a_bug() -> None:
    model = model_of(tied())
    QuantizeWeights(min_elements=0).apply(model, Context())
    with pytest.raises(CompilerBug, match="left after lowering"):
        LowerPortable().ensures(model, Context())
