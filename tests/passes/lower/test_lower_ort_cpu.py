from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import fused, model_of, product, proto, run, skipped, tied, weights
from lowering_checks import FLOAT_TOLERANCE, HALF_TOLERANCE, assert_close, compile_to, expected_of
from onnx import helper

from onnxslim_llm.errors import CompilerBug, UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.passes.lower.weights.lower_ort_cpu import LowerOrtCpu
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.targets.ort_cpu import ORT_CPU

#: Blocks of 16 for the table, so that there are enough scales.
NARROW = ({"match": "E", "block": 16},)
IDS = {"ids": np.array([[0, 5, -1], [7, 7, -3]], np.int64)}
#: Float32 products, so that nothing but the layout is tested.
EXACT = LowerOrtCpu(accuracy_level=1)


def compiled(source: onnx.ModelProto, folder: Path, lower: LowerOrtCpu = EXACT, **options: Any) -> Path:
    path = folder / "model.onnx"
    compile_to(ORT_CPU, lower, source, path, **options)
    return path


def attributes(path: Path, op: str) -> dict[str, Any]:
    node = next(n for n in onnx.load(path, load_external_data=False).graph.node if n.op_type == op)
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(128, 48, 32), (70, 33, 16), (47, 17, 0), (300, 20, 0), (96, 64, 64), (128, 32, 128), (256, 32, 256)],
)
def test_products(tmp_path: Path, bits: int, symmetric: bool, rows: int, columns: int, block: int) -> None:
    source = product(rows, columns)
    path = compiled(source, tmp_path, bits=bits, lm_head_bits=bits, block=block, symmetric=symmetric)
    feeds = {"x": weights(9, 3, rows)}
    expected = run(expected_of(source, set(), {"W": bits}, block, symmetric), feeds)
    assert_close(run(path, feeds), expected, FLOAT_TOLERANCE)
    assert fused(path, tmp_path) == {"MatMulNBits": 1}


@pytest.mark.parametrize("block", [32, 128, 0])
def test_two_bits(tmp_path: Path, block: int) -> None:
    source = product(96, 32, opset=25)
    path = compiled(source, tmp_path, bits=2, lm_head_bits=2, block=block)
    feeds = {"x": weights(9, 3, 96)}
    assert_close(run(path, feeds), run(expected_of(source, set(), {"W": 2}, block, True), feeds), FLOAT_TOLERANCE)


@pytest.mark.parametrize(("vocab", "width"), [(96, 64), (97, 70), (40, 33)])
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
    assert fused(path, tmp_path)["GatherBlockQuantized"] == 1


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    compiled(tied(512, 64), tmp_path, embedding_bits=4, lm_head_bits=4)
    table, inner, rest = 512 * 64 * (1 / 2 + 4 / 32), 64 * 64 * (1 / 2 + 4 / 32), 5 * 4096
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < table + inner + rest


def test_half_precision(tmp_path: Path) -> None:
    source = tied(dtype=np.float16)
    path = compiled(source, tmp_path, embedding_bits=4, lm_head_bits=4)
    expected = run(expected_of(source, {"E"}, {"E": 4, "W": 4}, 32, True), IDS)
    assert_close(run(path, IDS), expected, HALF_TOLERANCE)


def test_scales_in_half_precision_are_converted_by_the_runtime(tmp_path: Path) -> None:
    path = compiled(tied(512, 64), tmp_path, scale_dtype="float16", scopes=NARROW)
    near = run(path, IDS)
    assert fused(path, tmp_path)["Cast"] == 0
    whole = compiled(tied(512, 64), tmp_path, scale_dtype="activation", scopes=NARROW)
    assert_close(near, run(whole, IDS), 2**-7)  # 2^-11 of each scale, and the codes that it changes
    assert (near != run(whole, IDS)).any()


def test_the_accuracy_level_is_written(tmp_path: Path) -> None:
    path = compiled(product(64, 32), tmp_path, LowerOrtCpu(), lm_head_bits=4)
    assert attributes(path, "MatMulNBits") == {"K": 64, "N": 32, "bits": 4, "block_size": 32, "accuracy_level": 4}
    assert attributes(compiled(product(64, 32), tmp_path), "MatMulNBits")["accuracy_level"] == 1


def test_the_domain_is_imported(tmp_path: Path) -> None:
    path = compiled(tied(), tmp_path)
    imports = {item.domain: item.version for item in onnx.load(path, load_external_data=False).opset_import}
    assert imports == {"": 21, "com.microsoft": 1}


def test_branches(tmp_path: Path) -> None:
    text = """agraph (float[m, 64] x, bool c) => (float[m, 32] y) {
        y = If (c) <then_branch = a () => (float[m, 32] p) { p = MatMul (x, W) },
                    else_branch = b () => (float[m, 32] q) { r = MatMul (x, W)
                        q = Neg (r) }>
    }"""
    source = proto(text, W=weights(1, 64, 32))
    path = compiled(source, tmp_path, lm_head_bits=4)
    expected = expected_of(source, set(), {"W": 4}, 32, True)
    for choice in (True, False):
        feeds = {"x": weights(9, 3, 64), "c": np.array(choice)}
        assert_close(run(path, feeds, optimise=True), run(expected, feeds), FLOAT_TOLERANCE)


def test_the_artifact_is_at_a_fixpoint(tmp_path: Path) -> None:
    model = open_model(compiled(tied(), tmp_path))
    before = model.to_proto("omit").SerializeToString(deterministic=True)
    assert not QuantizeWeights(min_elements=0).apply(model, Context(target=ORT_CPU))
    assert not EXACT.apply(model, Context(target=ORT_CPU))
    assert model.to_proto("omit").SerializeToString(deterministic=True) == before


def test_three_bits_are_refused() -> None:
    model = model_of(product(64, 32))
    QuantizeWeights(bits=3, lm_head_bits=3, min_elements=0).apply(model, Context())
    with pytest.raises(UsageError, match="no operators for 3-bit weights"):
        EXACT.apply(model, Context())


def test_slow_two_bit_blocks_are_noted() -> None:
    model = model_of(product(256, 32, opset=25))
    context = Context()
    QuantizeWeights(bits=2, lm_head_bits=2, block=256, min_elements=0).apply(model, context)
    EXACT.apply(model, context)
    assert context.notes == ["W: there is no fast kernel for 2-bit blocks of 256; use 32, 64 or 128"]


def test_a_model_that_was_saved_half_way_gets_the_portable_form() -> None:
    model = model_of(product(64, 32))
    QuantizeWeights(min_elements=0, lm_head_bits=4).apply(model, Context())
    reopened = model_of(model.to_proto())
    change = EXACT.apply(reopened, Context())
    assert list(skipped(change).values()) == ["its codes are no recorded work: it gets the portable form"]
    feeds = {"x": weights(9, 3, 64)}
    assert_close(run(reopened.to_proto(), feeds), run(model.to_proto(), feeds), FLOAT_TOLERANCE)


def test_a_concept_that_is_left_is_a_bug() -> None:
    model = model_of(tied())
    QuantizeWeights(min_elements=0).apply(model, Context())
    with pytest.raises(CompilerBug, match="left after lowering"):
        EXACT.ensures(model, Context())
