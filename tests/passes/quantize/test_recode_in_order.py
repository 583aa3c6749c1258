"""`recode_in_order`: products that make up for the errors of those before them, in the same format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.passes.quantize.recode_in_order import RecodeInOrder
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.replay import SourceReplayer

VOCAB, K, N, ROWS = 48, 32, 64, 64
QUANTIZER: dict[str, Any] = {
    "block": 16,
    "method": "calibrated",
    "embedding_bits": 4,
    "lm_head_bits": 8,
    "sensitive": (),
    "min_elements": 0,
}
#: Tied through a transposed copy, as many exporters write it, or not; W is stored as a Gemm reads it, turned.
GRAPH = f"""<ir_version: 10, opset_import: ["" : 21]>
g (int64[t] ids) => (float[t, {VOCAB}] y) {{
    x = Gather (E, ids)
    a = Gemm <transB = 1> (x, W)
    h = Tanh (a)
    b = MatMul (h, U)
    r = Add (x, b)
    y = MatMul (r, V)
}}"""


def _source(*, tied: bool = False) -> onnx.ModelProto:
    proto, rng = parser.parse_model(GRAPH), np.random.default_rng(0)
    arrays = {name: rng.normal(size=s) * 0.4 for name, s in {"E": (VOCAB, K), "W": (N, K), "U": (N, K)}.items()}
    arrays["V"] = arrays["E"].T if tied else rng.normal(size=(K, VOCAB)) * 0.4
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
    return proto


def _samples(seed: int, count: int = 10) -> TensorCalibration:
    ids = np.random.default_rng(seed).integers(0, VOCAB, (count, ROWS))
    return TensorCalibration(tuple({"ids": row} for row in ids))


def _context(folder: Path, proto: onnx.ModelProto) -> Context:
    path = folder / "source.onnx"
    onnx.save(proto, path)
    statistics = collect(path, "m", _samples(1), folder / "statistics")[0]
    replayer = SourceReplayer(path, lambda: _samples(1), folder / "replay", threads=2)
    return Context(statistics=statistics, replayer=replayer)


def _run(folder: Path, *, tied: bool = False, **options: Any) -> tuple[Model, Change, Context]:
    model, context = from_proto(_source(tied=tied)), _context(folder, _source(tied=tied))
    steps = "tie_weights" if tied else "cleanup"
    Pipeline(steps).run(model, context)
    Pipeline([QuantizeWeights(**{**QUANTIZER, **options})]).run(model, context)
    return model, RecodeInOrder().apply(model, context), context


def _answers(proto: onnx.ModelProto) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["y"], feeds)[0] for feeds in _samples(2).feeds()])


def _error(model: Model, *, tied: bool) -> float:
    return float(np.square(_answers(model.to_proto("inline")) - _answers(_source(tied=tied))).mean())


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_the_answer_is_nearer_and_the_format_is_the_same(tmp_path: Path, bits: int, tied: bool) -> None:
    model, change, context = _run(tmp_path, tied=tied, bits=bits)
    plain = from_proto(_source(tied=tied))
    Pipeline("tie_weights" if tied else "cleanup").run(plain, context)
    Pipeline([QuantizeWeights(**{**QUANTIZER, "bits": bits})]).run(plain, context)
    before, after = plain.to_proto("inline"), model.to_proto("inline")
    assert [(t.name, t.data_type, list(t.dims), len(t.raw_data)) for t in before.graph.initializer] == [
        (t.name, t.data_type, list(t.dims), len(t.raw_data)) for t in after.graph.initializer
    ]
    assert set(change.sites) == {"W", "U"} | (set() if tied else {"V"})
    assert [skipped.where for skipped in change.skipped] == ["E"]
    assert _error(model, tied=tied) < 0.7 * _error(plain, tied=tied)


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    found = []
    for threads in (1, 3):
        model, context = from_proto(_source()), _context(tmp_path, _source())
        Pipeline([QuantizeWeights(**QUANTIZER)]).run(model, context)
        path = tmp_path / "source.onnx"
        context.replayer = SourceReplayer(path, lambda: _samples(1), tmp_path / "replay", threads=threads)
        RecodeInOrder().apply(model, context)
        found.append(model.to_proto("inline").SerializeToString(deterministic=True))
    assert found[0] == found[1]


def test_a_weight_that_another_pass_has_changed_stays(tmp_path: Path) -> None:
    proto = _source()
    context = _context(tmp_path, proto)
    tensor = next(t for t in proto.graph.initializer if t.name == "W")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), "W"))
    model = from_proto(proto)
    Pipeline([QuantizeWeights(**QUANTIZER)]).run(model, context)
    change = RecodeInOrder().apply(model, context)
    assert "W" not in change.sites
    assert {s.where: s.reason for s in change.skipped}["W"] == "a pass before has changed the weight"


def test_few_rows_change_nothing(tmp_path: Path) -> None:
    context = _context(tmp_path, _source())
    context.replayer = SourceReplayer(tmp_path / "source.onnx", lambda: _samples(1, count=4), tmp_path / "replay")
    model = from_proto(_source())
    Pipeline([QuantizeWeights(**QUANTIZER)]).run(model, context)
    change = RecodeInOrder().apply(model, context)
    reasons = {skipped.where: skipped.reason for skipped in change.skipped}
    assert reasons["U"] == f"{3 * ROWS} rows of calibration data are too few for {N} channels"
    assert "U" not in change.sites


def test_without_data_everything_stays() -> None:
    model = from_proto(_source())
    Pipeline([QuantizeWeights(**{**QUANTIZER, "method": "search"})]).run(model, Context())
    change = RecodeInOrder().apply(model, Context())
    assert not change.sites
    assert {skipped.reason for skipped in change.skipped} == {"there are no calibration data"}


def test_nothing_is_run_where_nothing_is_coded(tmp_path: Path) -> None:
    context = _context(tmp_path, _source())
    (tmp_path / "source.onnx").unlink()
    change = RecodeInOrder().apply(from_proto(_source()), context)
    assert not change.sites
