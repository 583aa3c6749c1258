"""Replays: what coders are told of inputs that drift is what a run of the whole changed model says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import parser

from onnxslim_llm.errors import ModelError
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.replay import Drift, SourceReplayer
from onnxslim_llm.stats.sums import added_to
from onnxslim_llm.stats.taps import Tap

V, K, N, ROWS, SAMPLES = 24, 12, 20, 40, 6
#: Sums of some hundred float32 products of numbers around 1, in another order.
CLOSE = 1e-3

GRAPH = f"""<ir_version: 10, opset_import: ["" : 21]>
g (int64[t] ids) => (float[t, {V}] y) {{
    x = Gather (E, ids)
    a = MatMul (x, A)
    h = Tanh (a)
    b = MatMul (h, B)
    c = Add (b, bias)
    r = Add (x, c)
    y = MatMul (r, C)
}}"""


def _proto() -> onnx.ModelProto:
    proto, rng = parser.parse_model(GRAPH), np.random.default_rng(0)
    for name, shape in {"E": (V, K), "A": (K, N), "B": (N, K), "C": (K, V), "bias": (K,)}.items():
        array = (rng.standard_normal(shape) / 2).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def _changed(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array + np.float32(0.05) * np.cos(np.arange(array.size, dtype=np.float32) + len(name)).reshape(array.shape)


@dataclass
class _Recorder:
    """Changes every weight, and keeps what it is told."""

    heard: dict[str, tuple[Drift, Drift]] = field(default_factory=dict)

    def begin(self, weight: Any, tables: tuple[str, ...]) -> dict[str, Any]:
        self.weight = weight
        return {name: _changed(name, weight(name)) for name in tables}

    def recode(self, tap: Tap, fit: Drift, held: Drift) -> dict[str, Any]:
        self.heard[tap.tensor] = fit, held
        return {name: _changed(name, self.weight(name)) for name in tap.weights}


def _data() -> TensorCalibration:
    ids = np.random.default_rng(1).integers(0, V, (SAMPLES, ROWS))
    return TensorCalibration(tuple({"ids": row} for row in ids))


def _everything(proto: onnx.ModelProto, ids: Any) -> dict[str, Any]:
    names = [name for node in proto.graph.node for name in node.output]
    extended = onnx.ModelProto()
    extended.CopyFrom(proto)
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "y")
    session = ort.InferenceSession(extended.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"ids": ids}), strict=True))


def test_drift_is_that_of_the_whole_model_with_all_weights_before_it_changed(tmp_path: Path) -> None:
    plain, coded = _proto(), _proto()
    for tensor in coded.graph.initializer:
        if tensor.name != "bias":
            new = _changed(tensor.name, onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(new, tensor.name))
    onnx.save(plain, tmp_path / "model.onnx")
    recorder = _Recorder()
    told: list[tuple[int, int]] = []
    SourceReplayer(
        tmp_path / "model.onnx", _data, tmp_path / "replay", progress=lambda *seen: told.append(seen)
    ).replay(recorder)
    assert list(recorder.heard) == ["x", "h", "r"]
    assert told[-1] == (3 * SAMPLES, 3 * SAMPLES)
    assert not any((tmp_path / "replay").rglob("*.npz"))
    held = [sample % 5 == 1 for sample in range(SAMPLES)]
    runs = [(_everything(plain, f["ids"]), _everything(coded, f["ids"])) for f in _data().feeds()]
    for tensor, parts in recorder.heard.items():
        for drift, wanted in zip(parts, (False, True), strict=True):
            pairs = [pair for pair, out in zip(runs, held, strict=True) if out is wanted]
            was, now = (np.concatenate([pair[i][tensor] for pair in pairs]).astype(np.float64) for i in (0, 1))
            assert drift.moments.gram is not None
            np.testing.assert_allclose(drift.moments.gram, now.T @ now, atol=CLOSE)
            np.testing.assert_allclose(drift.crossed, now.T @ (was - now), atol=CLOSE)
    # The product of B is added to x behind its bias: the pull makes up for x, too.
    fit, _ = recorder.heard["h"]
    weight = recorder.weight("B")
    pairs = [pair for pair, out in zip(runs, held, strict=True) if not out]
    was, now, beside, drifted = (
        np.concatenate([pair[i][name] for pair in pairs]).astype(np.float64) for name in "hx" for i in (0, 1)
    )
    expected = now.T @ (was @ weight + beside - (now @ weight + drifted))
    np.testing.assert_allclose(fit.pull("B", weight, slice(None)), expected, atol=CLOSE)
    np.testing.assert_allclose(fit.pull("B", weight[:, 3:5], slice(3, 5)), expected[:, 3:5], atol=CLOSE)


def test_numbers_that_overflow_name_the_tensor(tmp_path: Path) -> None:
    onnx.save(_proto(), tmp_path / "model.onnx")

    class _Breaks(_Recorder):
        def recode(self, tap: Tap, fit: Drift, held: Drift) -> dict[str, Any]:
            return {name: np.full_like(self.weight(name), np.nan) for name in tap.weights}

    with pytest.raises(ModelError, match="NaN or infinite") as caught:
        SourceReplayer(tmp_path / "model.onnx", _data, tmp_path / "replay").replay(_Breaks())
    assert caught.value.where == "tensor 'h'"
    assert not any((tmp_path / "replay").rglob("*.npz"))


def test_what_products_are_added_to() -> None:
    assert added_to(_proto().graph) == {"B": "x"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("r = Add (c, c)", "a sum with itself"),
        ("r = Add (x, c)\n    z = Tanh (c)", "something else reads it"),
        ("r = Mul (x, c)", "no sum"),
    ],
)
def test_other_sums_do_not_count(line: str, why: str) -> None:
    assert added_to(parser.parse_model(GRAPH.replace("r = Add (x, c)", line)).graph) == {}, why
