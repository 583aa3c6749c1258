"""Tuning codes and scales of a toy decoder: gradients, gains, and that threads do not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from gradient_models import proto_of  # noqa: E402

from onnxslim_llm.errors import ModelError, UsageError  # noqa: E402
from onnxslim_llm.gradients.latent_codes import LatentCodes  # noqa: E402
from onnxslim_llm.gradients.tuner import LogitTuner  # noqa: E402
from onnxslim_llm.gradients.tuning import Codes, Tunable, TuningPlan, TuningResult  # noqa: E402
from onnxslim_llm.ir.model import Model, from_proto  # noqa: E402
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights  # noqa: E402
from onnxslim_llm.passes.quantize.tune_codes import tunables  # noqa: E402
from onnxslim_llm.rewrite.context import Context  # noqa: E402
from onnxslim_llm.rewrite.passes import Change  # noqa: E402
from onnxslim_llm.stats.calibration import TensorCalibration, TokenCalibration  # noqa: E402

VOCAB, K, N, LEVELS = 48, 32, 64, 3
PLAN = TuningPlan(steps=40, batch=2, window=32, code_rate=0.01, scale_rate=0.005, replaced=0.1, seed=0)

DECODER = f"""agraph (int64[b, s] input_ids) => (float[b, s, {VOCAB}] logits) {{
    x = Gather (E, input_ids)
    a = MatMul (x, W)
    t = Tanh (a)
    logits = MatMul (t, V)
}}"""


def source() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"E": (VOCAB, K), "W": (K, N), "V": (N, VOCAB)}
    return proto_of(DECODER, 25, **{n: (rng.normal(size=s) * 0.4).astype(np.float32) for n, s in shapes.items()})


def text(count: int = 2048) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, count)


def calibration(tokens: np.ndarray, window: int = 64) -> TokenCalibration:
    return TokenCalibration(tokens, window, lambda ids: {"input_ids": ids})


def quantized() -> Model:
    model = from_proto(source())
    quantizer = QuantizeWeights(bits=2, block=16, embedding_bits=8, lm_head_bits=2, sensitive=(), min_elements=0)
    quantizer.apply(model, Context())
    return model


def tuner(folder: Path, tokens: Any = None, threads: int = 1) -> LogitTuner:
    file = folder / "source.onnx"
    onnx.save(source(), file)
    return LogitTuner(file, lambda: calibration(text() if tokens is None else tokens), threads)


def tuned(folder: Path, plan: TuningPlan = PLAN, threads: int = 1) -> TuningResult:
    model = quantized()
    return tuner(folder, threads=threads).tune(model, tunables(model, Change()), plan)


def same(a: TuningResult, b: TuningResult) -> bool:
    pairs = zip(a.weights, b.weights, strict=True)
    return all(np.array_equal(x.codes, y.codes) and np.array_equal(x.scales, y.scales) for x, y in pairs)


def test_tuning_lowers_the_divergence_on_text_that_was_held_out(tmp_path: Path) -> None:
    found = tuned(tmp_path)
    # 2 bits of random weights lose much, and 40 steps take back more than a tenth of it.
    assert found.kl_after < 0.9 * found.kl_before
    assert found.best_step > 0
    assert found.curve[0] == (0, found.kl_before)
    assert found.kl_after == min(kl for _, kl in found.curve)


def test_the_number_of_threads_does_not_show(tmp_path: Path) -> None:
    assert same(tuned(tmp_path, threads=1), tuned(tmp_path, threads=3))


def test_what_gets_worse_is_not_taken(tmp_path: Path) -> None:
    wild = replace(PLAN, steps=8, code_rate=0.5, scale_rate=0.1, replaced=1.0)
    model = quantized()
    start = tunables(model, Change())
    found = tuner(tmp_path).tune(model, start, wild)
    assert all(kl > found.kl_before for _, kl in found.curve[1:]), "steps of half a code lead nowhere"
    assert (found.best_step, found.kl_after) == (0, found.kl_before)
    assert all(np.array_equal(x.codes, y.start.codes) for x, y in zip(found.weights, start, strict=True))


def toy(floats: Any = None) -> Tunable:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, LEVELS + 1, (20, 5)).astype(np.uint8)
    scales = rng.uniform(0.05, 0.2, (2, 5)).astype(np.float32)
    zeros = np.full((2, 5), 2, np.uint8)
    return Tunable("W", "W_q", Codes(codes, scales, zeros), 16, LEVELS, False, floats)


def test_gradients_of_scales_are_differences() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(7, 20)), rng.normal(size=(7, 5))

    def loss(weight: np.ndarray) -> float:
        return float(np.square(x @ weight.astype(np.float64) - y).sum())

    def weight(scales: np.ndarray) -> np.ndarray:
        return np.repeat(scales.astype(np.float64), 16, 0)[:20] * (start.codes.astype(np.float64) - 2)

    start = toy().start
    at = weight(start.scales)
    _, by_scale = LatentCodes(toy()).gradients(torch.from_numpy((2 * x.T @ (x @ at - y)).astype(np.float32)))
    step = 1e-3  # the loss is quadratic: a central difference is exact up to float32 of the result
    for block, column in np.ndindex(2, 5):
        up, down = start.scales.astype(np.float64), start.scales.astype(np.float64)
        up[block, column] *= 1 + step
        down[block, column] *= 1 - step
        difference = (loss(weight(up)) - loss(weight(down))) / (2 * step)
        assert by_scale[block, column].item() == pytest.approx(difference, rel=1e-4, abs=1e-4)


def test_zeros_stay_zeros_and_codes_without_floats_stay() -> None:
    start = toy().start
    floats = (start.codes.astype(np.float32) - 2) * np.repeat(start.scales, 16, 0)[:20]
    push = torch.ones(20, 5)
    latent, fixed = LatentCodes(toy(floats)), LatentCodes(toy())
    for step in range(1, 30):
        latent.move(push, 0.1, 0.0, step)
        fixed.move(push, 0.1, 0.0, step)
    assert np.array_equal(fixed.stored().codes, start.codes)
    pruned = floats == 0
    assert pruned.any()
    assert np.array_equal(latent.stored().codes[pruned], start.codes[pruned])
    assert not latent.stored().codes[~pruned].any(), "all others have gone down to the lowest code"


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    model = quantized()
    with pytest.raises(UsageError, match="too few to tune with"):
        tuner(tmp_path, text(40)).tune(model, tunables(model, Change()), PLAN)


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    proto = proto_of(
        f"agraph (float[b, {K}] x) => (float[b, {N}] y) {{ y = MatMul (x, W) }}", W=np.eye(K, N, dtype="f")
    )
    onnx.save(proto, tmp_path / "encoder.onnx")
    with pytest.raises(ModelError, match="where a model writes text"):
        LogitTuner(tmp_path / "encoder.onnx", lambda: calibration(text())).tune(from_proto(proto), [], PLAN)


def test_arrays_are_refused(tmp_path: Path) -> None:
    model, file = quantized(), tmp_path / "source.onnx"
    onnx.save(source(), file)
    with pytest.raises(UsageError, match="a text, not arrays"):
        LogitTuner(file, lambda: TensorCalibration(())).tune(model, tunables(model, Change()), PLAN)


def test_windows_are_no_longer_than_those_of_the_calibration(tmp_path: Path) -> None:
    model = quantized()
    made = tuner(tmp_path)
    made.data = lambda: calibration(text(100), window=10)
    found = made.tune(model, tunables(model, Change()), replace(PLAN, steps=1))
    assert found.tokens == (80, 20)
