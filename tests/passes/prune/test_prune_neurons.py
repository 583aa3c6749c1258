"""`prune_neurons`: which layers have hidden channels, that all their weights shrink, and what the fit makes good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import model_of, proto, run, skipped, weights

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.prune.prune_neurons import PruneNeurons
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.statistics import Statistics

WIDTH, HIDDEN = 16, 64
HEAD = "agraph (float[b, s, 16] x) => (float[b, s, 16] y) {"
GATED = f"{HEAD} g = MatMul (x, G) e = Sigmoid (g) a = Mul (g, e) u = MatMul (x, U) h = Mul (a, u) y = MatMul (h, D) }}"
BIASED = f"{HEAD} u = MatMul (x, U) v = Add (u, bias) h = Relu (v) d = MatMul (h, D) y = Add (d, out) }}"
PACKED = f"""{HEAD}
    p = MatMul (x, GU)
    g, u = Split <axis = -1> (p, halves)
    t = Tanh (g)
    h = Mul (t, u)
    y = MatMul (h, D)
}}"""
HALVES = np.array([HIDDEN, HIDDEN], np.int64)


def gated() -> onnx.ModelProto:
    return proto(GATED, G=weights(0, WIDTH, HIDDEN), U=weights(1, WIDTH, HIDDEN), D=weights(2, HIDDEN, WIDTH))


def biased() -> onnx.ModelProto:
    vectors = {"bias": weights(3, HIDDEN), "out": weights(4, WIDTH)}
    return proto(BIASED, U=weights(1, WIDTH, HIDDEN), D=weights(2, HIDDEN, WIDTH), **vectors)


def packed() -> onnx.ModelProto:
    return proto(PACKED, GU=weights(0, WIDTH, 2 * HIDDEN), D=weights(2, HIDDEN, WIDTH), halves=HALVES)


MODELS = {"gated": gated, "biased": biased, "packed": packed}


def feeds(seed: int, rows: int = 40) -> dict[str, np.ndarray]:
    return {"x": weights(seed, 1, rows, WIDTH)}


def statistics_of(model: onnx.ModelProto, folder: Path) -> Statistics:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return collect(path, "m", TensorCalibration(tuple(feeds(s, 100) for s in range(10))), folder / "statistics")[0]


def pruned(source: onnx.ModelProto, statistics: Statistics | None, **options: Any) -> tuple[Model, PassRecord]:
    model = model_of(source)
    (record,) = Pipeline([PruneNeurons(**options)]).run(model, Context(statistics=statistics))
    return model, record


def error(source: onnx.ModelProto, model: Model, folder: Path) -> float:
    save_model(model, folder / "pruned.onnx")
    x = feeds(99, 500)
    return float(np.square(run(source, x) - run(folder / "pruned.onnx", x)).mean())


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_all_weights_of_a_layer_shrink(tmp_path: Path, kind: str) -> None:
    source = MODELS[kind]()
    model, record = pruned(source, statistics_of(source, tmp_path), share=0.5)
    assert record.changed == 1
    assert record.detail["layers"] == [{"name": "D", "channels": [HIDDEN, HIDDEN // 2]}]
    shapes = {
        name: list(weight_of(t).shape) for name, t in model.graph.tensors().items() if name in "GUD" or name == "GU"
    }
    assert shapes.pop("D") == [HIDDEN // 2, WIDTH]
    if kind == "packed":
        assert shapes == {"GU": [WIDTH, HIDDEN]}
    else:
        assert all(shape == [WIDTH, HIDDEN // 2] for shape in shapes.values())
    assert np.isfinite(error(source, model, tmp_path))


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_fit_makes_good_for_what_is_missing(tmp_path: Path, kind: str) -> None:
    source = MODELS[kind]()
    statistics = statistics_of(source, tmp_path)
    plain = error(source, pruned(source, None, share=0.5, refit=False)[0], tmp_path)
    fitted = error(source, pruned(source, statistics, share=0.5)[0], tmp_path)
    assert fitted < plain


def test_channels_that_say_nothing_go_first_and_nothing_changes(tmp_path: Path) -> None:
    source = biased()
    by_name = {t.name: t for t in source.graph.initializer}
    dead = np.arange(0, HIDDEN, 2)
    down = onnx.numpy_helper.to_array(by_name["D"]).copy()
    down[dead] = 0
    by_name["D"].CopyFrom(onnx.numpy_helper.from_array(down, "D"))
    for options in ({"refit": False}, {}):
        statistics = None if options else statistics_of(source, tmp_path)
        model, _ = pruned(source, statistics, share=0.5, **options)
        kept = weight_of(model.graph.tensors()["U"]).load()
        up = onnx.numpy_helper.to_array(by_name["U"])
        np.testing.assert_array_equal(kept, up[:, 1::2])
        # The damping of the least squares is all that may differ.
        assert error(source, model, tmp_path) < 1e-3 * np.square(run(source, feeds(99, 500))).mean()


def test_later_passes_see_the_inputs_that_are_left(tmp_path: Path) -> None:
    source = gated()
    context = Context(statistics=statistics_of(source, tmp_path))
    Pipeline([PruneNeurons(share=0.25)]).run(model_of(source), context)
    assert context.statistics is not None
    moments = context.statistics.of_weight("D")
    assert moments is not None
    assert moments.size == 64  # 48 rounded up to a multiple of 32: nothing could go
    Pipeline([PruneNeurons(share=0.25, align=16)]).run(model_of(source), context)
    moments = context.statistics.of_weight("D")
    assert moments is not None
    assert moments.size == 48


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = MatMul (x, U) n = Softmax (h) y = MatMul (n, D)", "Softmax 'n' mixes what the product sums"),
        (
            "h = MatMul (x, U) r = Relu (h) s = ReduceSum (h) z = MatMul (r, D) y = Add (z, s)",
            "ReduceSum 's' reads 'h', too",
        ),
        ("y = MatMul (x, S)", "an input of the model reaches it without a product"),
    ],
)
def test_layers_that_cannot_shrink_say_why(body: str, reason: str) -> None:
    text = f"{HEAD} {body} }}"
    names = {"U": (WIDTH, HIDDEN), "D": (HIDDEN, WIDTH), "S": (WIDTH, WIDTH)}
    used = {n: weights(1, *shape) for n, shape in names.items() if f", {n})" in body}
    _, record = pruned(proto(text, **used), None, share=0.5, refit=False)
    assert not record.changed
    assert any(reason in text for text in skipped(record).values())


def test_a_weight_with_two_uses_stays() -> None:
    body = "u = MatMul (x, U) r = Relu (u) v = MatMul (x, U) h = Mul (r, v) y = MatMul (h, D)"
    source = proto(f"{HEAD} {body} }}", U=weights(1, WIDTH, HIDDEN), D=weights(2, HIDDEN, WIDTH))
    _, record = pruned(source, None, share=0.5, refit=False)
    assert skipped(record)["D"] == "'U' has several uses"


@pytest.mark.parametrize("lowering", ["lower_portable", "lower_ort_cpu"])
def test_quantized_weights_are_named(lowering: str) -> None:
    quantized = Pipeline([QuantizeWeights(bits=8, block=16, min_elements=0)])
    model = model_of(gated())
    quantized.run(model)
    Pipeline(lowering).run(model)
    (record,) = Pipeline([PruneNeurons(share=0.5, refit=False)]).run(model)
    assert not record.changed
    assert len(record.skipped) == 3
    assert {skip.reason for skip in record.skipped} == {"it is quantized already"}


def test_layers_are_excluded_by_name() -> None:
    _, record = pruned(gated(), None, share=0.5, refit=False, exclude=("^D$",))
    assert skipped(record)["D"] == "it is excluded by '^D$'"


@pytest.mark.parametrize("options", [{"share": 1.0}, {"share": -0.1}, {"align": 0}, {"exclude": ("(",)}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PruneNeurons(**options)


def test_data_are_asked_for() -> None:
    with pytest.raises(UsageError, match="without calibration data"):
        pruned(gated(), None)
