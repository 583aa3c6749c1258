from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import Array, Feeds, model_of, product, run, skipped, tied, weights
from lowering_checks import FLOAT_TOLERANCE, HALF_TOLERANCE, assert_close, compile_to, expected_of
from onnx import helper, numpy_helper

from onnxslim_llm.custom_ops import ops, packed
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.passes.lower.weights.lower_ort_cpu_ops import LowerOrtCpuOps
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.targets.ort_cpu_ops import ORT_CPU_OPS

needs_library = pytest.mark.skipif(ops.library_path() is None, reason="the operator library was not built here")

IDS = {"ids": np.array([[0, 5, -1], [7, 7, -3]], np.int64)}
EXACT = LowerOrtCpuOps(accuracy="exact")


def compiled(source: onnx.ModelProto, folder: Path, lower: LowerOrtCpuOps = EXACT, **options: Any) -> Path:
    ops.register_schemas()  # for onnx.checker
    path = folder / "model.onnx"
    compile_to(ORT_CPU_OPS, lower, source, path, **options)
    return path


def run_with_library(path: Path, feeds: Feeds, *, optimise: bool = False) -> Array:
    result: Array = next(iter(open_session(path, threads=1, optimise=optimise).run(feeds).values()))
    return result


def nodes_of(path: Path, op: str) -> list[onnx.NodeProto]:
    return [n for n in onnx.load(path, load_external_data=False).graph.node if n.op_type == op]


def attributes(path: Path, op: str) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in nodes_of(path, op)[0].attribute}


@needs_library
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(128, 48, 32), (70, 33, 16), (47, 17, 0), (300, 20, 0), (96, 64, 64), (128, 32, 128), (256, 32, 256)],
)
def test_products(tmp_path: Path, bits: int, symmetric: bool, rows: int, columns: int, block: int) -> None:
    source = product(rows, columns, opset=25 if bits == 2 else 21, **({"ir_version": 13} if bits == 2 else {}))
    path = compiled(source, tmp_path, bits=bits, lm_head_bits=bits, block=block, symmetric=symmetric)
    feeds = {"x": weights(9, 3, rows)}
    expected = run(expected_of(source, set(), {"W": bits}, block, symmetric), feeds)
    assert_close(run_with_library(path, feeds), expected, FLOAT_TOLERANCE)


@needs_library
@pytest.mark.parametrize(("vocab", "width"), [(96, 64), (97, 70), (40, 33)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_tied_tables(tmp_path: Path, vocab: int, width: int, symmetric: bool, bits: int) -> None:
    source = tied(vocab, width)
    path = compiled(source, tmp_path, embedding_bits=bits, lm_head_bits=bits, symmetric=symmetric, bits=min(bits, 4))
    widths = {"E": bits, "W": min(bits, 4)}
    expected = run(expected_of(source, {"E"}, widths, 32, symmetric), IDS)
    for optimise in (False, True):
        assert_close(run_with_library(path, IDS, optimise=optimise), expected, FLOAT_TOLERANCE)
    look_up, classifier = nodes_of(path, "GatherPacked")[0], nodes_of(path, "MatMulPacked")[-1]
    assert look_up.input[0] == classifier.input[1]


@needs_library
def test_half_precision(tmp_path: Path) -> None:
    source = tied(dtype=np.float16)
    path = compiled(source, tmp_path, embedding_bits=4, lm_head_bits=4)
    expected = run(expected_of(source, {"E"}, {"E": 4, "W": 4}, 32, True), IDS)
    assert_close(run_with_library(path, IDS), expected, HALF_TOLERANCE)


def test_a_table_of_its_own_is_left_to_the_runtime(tmp_path: Path) -> None:
    model = model_of(tied())
    QuantizeWeights(min_elements=0, lm_head_bits=0, embedding_bits=4).apply(model, Context())
    change = LowerOrtCpuOps().apply(model, Context())
    assert model.census()["onnxslim_llm.ops::GatherPacked"] == 0
    assert len(change.sites) == model.census()["onnxslim_llm.ops::MatMulPacked"]


@pytest.mark.parametrize("accuracy", ["exact", "bf16", "int8"])
def test_the_accuracy_is_written(tmp_path: Path, accuracy: Any) -> None:
    path = compiled(product(64, 32), tmp_path, LowerOrtCpuOps(accuracy=accuracy), lm_head_bits=4)
    expected = {"K": 64, "N": 32, "bits": 4, "block_size": 32, "accuracy": accuracy.encode()}
    assert attributes(path, "MatMulPacked") == expected


def test_some_products_can_be_exact() -> None:
    model = model_of(tied())
    QuantizeWeights(min_elements=0, lm_head_bits=4, embedding_bits=4).apply(model, Context())
    LowerOrtCpuOps(exact=("^E$",)).apply(model, Context())
    found = {n.inputs[1].name: n.attrs["accuracy"] for n in model.graph.nodes if n.op == "MatMulPacked"}
    assert found == {"E_q4": "exact", "W_q4": "int8"}


def test_a_pattern_must_be_one() -> None:
    with pytest.raises(UsageError, match="no regular expression"):
        LowerOrtCpuOps(exact=("(",))


def test_what_is_written_is_a_packed_weight(tmp_path: Path) -> None:
    path = compiled(product(270, 133), tmp_path, lm_head_bits=4, symmetric=False, scale_dtype="float16")
    tensor = next(t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.UINT8)
    scheme = packed.parse(numpy_helper.to_array(tensor))
    assert (scheme.rows, scheme.columns, scheme.bits, scheme.block) == (270, 133, 4, 32)
    assert (scheme.symmetric, scheme.scale_dtype, scheme.paired) == (False, "float16", False)


def test_weights_lie_at_cache_lines(tmp_path: Path) -> None:
    path = compiled(tied(20_000, 128), tmp_path, embedding_bits=4, lm_head_bits=4)
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    places = [{e.key: e.value for e in t.external_data} for t in tensors if t.external_data]
    assert len(places) == 2
    assert all(int(place["offset"]) % 64 == 0 for place in places)


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_bytes_do_not_depend_on_threads_or_tiles(
    tmp_path: Path, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 48 columns, and of 20: those are put together until they end with a strip of 16."""
    from onnxslim_llm.passes.quantize.codes import job

    def data(columns: int, together: int) -> bytes:
        monkeypatch.setattr(job, "TILE_BYTES", columns * 70 * 4)
        monkeypatch.setattr(job, "_COLUMNS_TOGETHER", together)
        model = model_of(tied(700, 70))
        steps = "quantize_weights{min_elements=0, embedding_bits=4, lm_head_bits=4}, lower_ort_cpu_ops"
        Pipeline(steps).run(model, Context(target=ORT_CPU_OPS))
        path = tmp_path / "model.onnx"
        save_model(model, path, SaveOptions(jobs=jobs, external=True))
        return (tmp_path / "model.onnx.data").read_bytes()

    assert data(48, 16) == data(20, 4) == data(10**6, 16)


def test_a_model_that_was_saved_half_way_is_left_for_the_next_pass() -> None:
    model = model_of(product(64, 32))
    QuantizeWeights(min_elements=0, lm_head_bits=4).apply(model, Context())
    reopened = model_of(model.to_proto())
    change = EXACT.apply(reopened, Context())
    assert list(skipped(change).values()) == ["its codes are no recorded work"]
    assert not change.sites


def test_nothing_to_do(tmp_path: Path) -> None:
    path = compiled(tied(), tmp_path)
    model = open_model(path)
    assert not EXACT.apply(model, Context(target=ORT_CPU_OPS))
