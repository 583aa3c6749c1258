from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.stats.calibration import TensorCalibration, TokenCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.segments import plan_segments
from onnxslim_llm.stats.taps import find_taps

WIDTH, LAYERS, SAMPLES = 16, 3, 5
#: One float32 product of some dozens of numbers around one, summed in another order.
TOLERANCE = 1e-4


def _blocks(path: Path) -> Path:
    """Write y = x + relu(x A) B, three times; A and a third weight C share their input."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    x = "x"
    for i in range(LAYERS):
        for name, shape in (("A", (WIDTH, 24)), ("B", (24, WIDTH)), ("C", (WIDTH, 24))):
            weights.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 4, f"{name}{i}"))
        nodes += [
            helper.make_node("MatMul", [x, f"A{i}"], [f"a{i}"]),
            helper.make_node("MatMul", [x, f"C{i}"], [f"c{i}"]),
            helper.make_node("Add", [f"a{i}", f"c{i}"], [f"s{i}"]),
            helper.make_node("Relu", [f"s{i}"], [f"r{i}"]),
            helper.make_node("Gemm", [f"r{i}", f"B{i}"], [f"b{i}"]),
            helper.make_node("Add", [x, f"b{i}"], [f"x{i}"]),
        ]
        x = f"x{i}"
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", WIDTH]) for n in ("x", x)]
    graph = helper.make_graph(nodes, "blocks", io[:1], io[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def _data(samples: int = SAMPLES) -> TensorCalibration:
    rng = np.random.default_rng(1)
    return TensorCalibration(tuple({"x": rng.standard_normal((7, WIDTH)).astype(np.float32)} for _ in range(samples)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return _blocks(tmp_path / "model.onnx")


def test_moments_are_those_of_the_rows() -> None:
    rows = np.random.default_rng(2).standard_normal((3000, 6)).astype(np.float32)
    moments = Moments(6)
    moments.add(rows[:100].reshape(10, 10, 6))
    moments.add(rows[100:])
    wide = rows.astype(np.float64)
    assert moments.count == 3000
    assert moments.gram is not None
    assert np.allclose(moments.gram, wide.T @ wide, rtol=TOLERANCE, atol=TOLERANCE * 3000)
    assert np.allclose(np.diag(moments.gram), moments.square, rtol=TOLERANCE)
    assert np.allclose(moments.mean, wide.mean(0), atol=TOLERANCE)
    assert np.allclose(moments.variance, wide.var(0), rtol=TOLERANCE)
    assert np.allclose(moments.mean_absolute, np.abs(wide).mean(0), rtol=TOLERANCE)
    assert np.array_equal(moments.largest, np.abs(wide).max(0))
    again = Moments.from_arrays(moments.arrays())
    assert again.count == moments.count
    assert np.array_equal(again.mean, moments.mean)


def test_products_with_the_same_input_share_a_tap(model: Path) -> None:
    taps = find_taps(onnx.load(model).graph)
    assert [(t.tensor, t.size, t.weights) for t in taps[:2]] == [("x", WIDTH, ["A0", "C0"]), ("r0", 24, ["B0"])]
    assert len(taps) == 2 * LAYERS


def test_the_cut_goes_where_least_crosses(model: Path) -> None:
    graph = onnx.load(model).graph
    segments = plan_segments(graph, find_taps(graph), limit=1)
    assert len(segments) == 2 * LAYERS
    assert all(len(s.carried_out) <= 2 for s in segments)
    assert [s.carried_out for s in segments if len(s.taps) and s.taps[0].tensor == "x0"] == [("x0",)]  # nothing else


@pytest.mark.parametrize("limit", [1, 12 * (WIDTH**2 + 24**2), 1 << 30], ids=["one tap", "a block", "all"])
def test_segments_give_what_the_whole_model_gives(model: Path, tmp_path: Path, limit: int) -> None:
    data = _data()
    statistics, notes = collect(model, "m", data, tmp_path / "cache", limit=limit)
    proto = onnx.load(model)
    names = [tap.tensor for tap in find_taps(proto.graph) if tap.tensor != "x"]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_session(proto)
    runs = [session.run(feeds) for feeds in data.feeds()]
    for name in names:
        rows = np.concatenate([run[name] for run in runs]).astype(np.float64)
        found = statistics.of_tensor(name)
        assert found is not None
        collected = found.load()
        assert (collected.fit.count, collected.held.count) == (7 * SAMPLES - 7, 7)
        assert collected.fit.gram is not None
        assert collected.held.gram is not None
        assert np.allclose(collected.fit.gram + collected.held.gram, rows.T @ rows, rtol=1e-3, atol=1e-2)
        assert np.allclose(collected.held.gram, rows[7:14].T @ rows[7:14], rtol=1e-3, atol=1e-2)
    assert statistics.of_weight("C1") is not None
    assert statistics.of_weight("nothing") is None
    assert not notes
    assert not (tmp_path / "cache" / "carried").exists()


def test_few_rows_are_noted(model: Path, tmp_path: Path) -> None:
    _, notes = collect(model, "m", _data(1), tmp_path / "cache")
    assert any("only 7 calibration tokens for K = 16" in note for note in notes)


def test_a_second_collection_runs_nothing(model: Path, tmp_path: Path) -> None:
    first, _ = collect(model, "m", _data(), tmp_path / "cache", limit=1)
    ran: list[int] = []

    class Watched(TensorCalibration):
        def feeds(self):  # type: ignore[no-untyped-def]
            ran.append(1)
            return super().feeds()

    second, _ = collect(model, "m", Watched(_data().samples), tmp_path / "cache", limit=1)
    assert not ran
    assert [t.tensor for t in second.taps] == [t.tensor for t in first.taps]
    collect(model, "another model", Watched(_data().samples), tmp_path / "cache", limit=1)
    assert ran


def test_an_interrupted_collection_goes_on(model: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == SAMPLES * 3 + 2:
            raise StopError

    with pytest.raises(StopError):
        collect(model, "m", _data(), tmp_path / "cache", limit=1, progress=stop)
    seen: list[int] = []
    resumed, _ = collect(
        model, "m", _data(), tmp_path / "cache", limit=1, progress=lambda done, total: seen.append(done)
    )
    whole, _ = collect(model, "m", _data(), tmp_path / "other", limit=1)
    assert len(resumed.taps) == 2 * LAYERS
    for tap in whole.taps:
        a, b = resumed.of_tensor(tap.tensor), whole.of_tensor(tap.tensor)
        assert a is not None
        assert b is not None
        assert np.array_equal(a.load().fit.square, b.load().fit.square)
    assert len(seen) < 2 * LAYERS * SAMPLES  # finished segments are one step each


def test_infinite_activations_are_named(model: Path, tmp_path: Path) -> None:
    for value, wrong in ((np.inf, "NaN or infinite"), (2e38, "squares overflow")):
        bad = TensorCalibration(({"x": np.full((2, WIDTH), value, np.float32)},))
        with pytest.raises(ModelError, match=wrong) as caught:
            collect(model, "m", bad, tmp_path / "cache")
        assert "'x'" in caught.value.where


@pytest.mark.parametrize(("ids", "wrong"), [([], "no tokens"), ([1, 9], "token id 9"), ([-1, 2], "token id -1")])
def test_tokens_that_do_not_fit_are_refused(ids: list[int], wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        TokenCalibration.checked(np.array(ids, np.int64), 4, 9, lambda ids: {})


def test_a_decoder_with_a_cache(tmp_path: Path) -> None:
    path = next(Path("models").glob("*/model.onnx"), None)
    if path is None:
        pytest.skip("run from the repository: the sample model lies there")
    runner = DecoderRunner(open_session(path))
    tokens = np.random.default_rng(3).integers(0, runner.vocab, 96)
    data = TokenCalibration.checked(tokens, 32, runner.vocab, runner.arrays)
    statistics, _ = collect(path, "sample", data, tmp_path / "cache", limit=1 << 20)
    layers = len(runner.signature.caches) // 2
    assert len(statistics.taps) == 4 * layers + 1  # q/k/v, output, gate/up, down, and the classifier
    found = [statistics.of_tensor(tap.tensor) for tap in statistics.taps]
    assert all(moments is not None and moments.count == 64 for moments in found)  # one window of three is held out


def test_an_encoder_is_fed_its_inputs_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    arrays = {"table": (11, WIDTH), "A": (WIDTH, 24), "B": (24, WIDTH)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in arrays.items()]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["e"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["column"]),
        helper.make_node("Mul", ["e", "column"], ["x"]),
        helper.make_node("MatMul", ["x", "A"], ["h"]),
        helper.make_node("Gelu", ["h"], ["g"]),
        helper.make_node("MatMul", ["g", "B"], ["last_hidden_state"]),
    ]
    weights.append(numpy_helper.from_array(np.array([2], np.int64), "last"))
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", "S"]) for n in ("input_ids", "attention_mask")]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["B", "S", WIDTH])
    graph = helper.make_graph(nodes, "encoder", inputs, [output], weights)
    path = tmp_path / "encoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    samples = []
    for length in (3, 7, 5):  # batches of different shapes
        ids = rng.integers(0, 11, (2, length))
        samples.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    statistics, _ = collect(path, "encoder", TensorCalibration(tuple(samples)), tmp_path / "cache")
    table = numpy_helper.to_array(weights[0])
    rows = np.concatenate([table[s["input_ids"]].reshape(-1, WIDTH) for s in (samples[0], samples[2])])
    stored = statistics.of_weight("A")
    assert stored is not None
    collected = stored.load()
    assert (collected.fit.count, collected.held.count) == (16, 14)
    assert np.allclose(collected.fit.square, np.square(rows, dtype=np.float64).sum(0), rtol=TOLERANCE)
    assert statistics.of_weight("B") is not None
