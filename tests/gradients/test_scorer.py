"""Figures of gradients on toys: against differences of what the model answers, and against plain definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

torch = pytest.importorskip("torch")

from gradient_models import model_of  # noqa: E402

from onnxslim_llm.errors import ModelError  # noqa: E402
from onnxslim_llm.gradients.scorer import GradientScorer  # noqa: E402
from onnxslim_llm.ir.model import Model  # noqa: E402

TOKENS, K, N, VOCAB = 20_000, 6, 5, 4
#: A mean of squares over 20,000 drawn answers; a squared normal number varies by sqrt(2) of its mean: 1 % of it, twice.
SAMPLING = 0.05

DECODER = f"""agraph (int64[b, s] input_ids) => (float[b, s, {VOCAB}] logits) {{
    x = Gather (E, input_ids)
    a = MatMul (x, W)
    t = Tanh (a)
    logits = MatMul (t, V)
}}"""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"E": (VOCAB, K), "W": (K, N), "V": (N, VOCAB)}
    # Small logits: a rare answer would have rare, large gradients, which few tokens do not show.
    return {name: rng.normal(size=shape).astype(np.float32) * np.float32(0.5) for name, shape in shapes.items()}


def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (4, TOKENS // 4))


def scorer(folder: Path, feeds: list[dict[str, Any]], **options: Any) -> GradientScorer:
    return GradientScorer(lambda session: iter(feeds), folder, **options)


def logits_with(changed: dict[str, np.ndarray]) -> np.ndarray:
    given = {**{n: w.astype(np.float64) for n, w in weights().items()}, **changed}
    return np.tanh(given["E"][ids().reshape(-1)] @ given["W"]) @ given["V"]


def divergence(changed: dict[str, np.ndarray]) -> float:
    logs = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logits_with({}), logits_with(changed))]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean())


def test_half_the_squared_figure_is_the_divergence_of_a_small_change(tmp_path: Path) -> None:
    found = scorer(tmp_path, [{"input_ids": ids()}], tokens=TOKENS).figures(
        model_of(DECODER, **weights()), ["W", "V"], "squared"
    )
    step = 1e-3
    for name, shape in (("W", (K, N)), ("V", (N, VOCAB))):
        fisher = found[name].view()
        assert fisher.shape == shape
        measured = np.zeros(shape)
        for place in np.ndindex(*shape):
            changed = weights()[name].astype(np.float64)
            changed[place] += step
            measured[place] = divergence({name: changed})
        relative = np.abs(0.5 * step**2 * fisher - measured) / measured
        assert relative.max() < SAMPLING


def test_the_absolute_figure_is_the_mean_size_of_a_tokens_gradient(tmp_path: Path) -> None:
    few = ids()[:, :8]
    model = model_of(DECODER, **weights())
    found = scorer(tmp_path, [{"input_ids": few}]).figures(model, ["W"], "absolute")["W"].view()
    given = {name: torch.from_numpy(w) for name, w in weights().items()}
    random = torch.Generator().manual_seed(0)
    w = given["W"].clone().requires_grad_()
    logits = torch.tanh(given["E"][few.reshape(-1)] @ w) @ given["V"]
    labels = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=random)[:, 0]
    total = torch.zeros(K, N)
    for row, label in zip(logits, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(row, label)
        (slope,) = torch.autograd.grad(loss, w, retain_graph=True)
        total += slope.abs()
        # And one of these slopes is a difference of losses: the score |w g| is what the first order says of w -> 0.
    np.testing.assert_allclose(found, total / len(labels), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("figure", ["absolute", "squared"])
def test_gemm_and_transposed_weights_give_the_same(tmp_path: Path, figure: Any) -> None:
    w, rows = weights()["W"], np.random.default_rng(2).normal(size=(7, K)).astype(np.float32)
    texts = {
        "MatMul (x, W)": w,
        "Gemm <alpha = 1.0> (x, W)": w,
        "Gemm <transB = 1> (x, W)": np.ascontiguousarray(w.T),
    }
    found = []
    for number, (text, stored) in enumerate(texts.items()):
        body = f"agraph (float[7, {K}] x) => (float[7, {N}] y) {{ y = {text} }}"
        source = scorer(tmp_path / str(number), [{"x": rows}])
        figures = source.figures(model_of(body, W=stored), ["W"], figure)["W"].view()
        found.append(figures if stored.shape == w.shape else figures.T)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


def test_an_output_that_is_no_distribution_counts_by_its_relative_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    w, rows = weights()["W"], rng.normal(size=(TOKENS, K)).astype(np.float32)
    body = f"agraph (float[m, {K}] x) => (float[m, {N}] y) {{ y = MatMul (x, W) }}"
    fisher = scorer(tmp_path, [{"x": rows}]).figures(model_of(body, W=w), ["W"], "squared")["W"].view()
    # A change e of w_kn changes y by x_k e: relative to the mean square of a row of y.
    expected = np.square(rows).mean(0)[:, None] / np.square(rows @ w).sum(1).mean() * np.ones((1, N))
    np.testing.assert_allclose(fisher, expected, rtol=SAMPLING)


def test_little_memory_takes_more_runs_and_gives_the_same(tmp_path: Path) -> None:
    samples = [{"input_ids": ids()[:, :50]}, {"input_ids": ids()[:, 50:90]}]
    told: list[tuple[int, int]] = []
    model = model_of(DECODER, **weights())
    whole = scorer(tmp_path / "whole", samples).figures(model, ["W", "V"], "squared")
    parts = scorer(tmp_path / "parts", samples, limit=1, progress=lambda done, of: told.append((done, of))).figures(
        model, ["W", "V"], "squared"
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for name in ("W", "V"):
        np.testing.assert_allclose(parts[name].view(), whole[name].view(), rtol=1e-5)
        assert parts[name].digest == whole[name].digest


def test_an_operator_without_a_gradient_is_named(tmp_path: Path) -> None:
    model: Model = model_of(DECODER, **weights())
    tanh = next(node for node in model.graph.nodes if node.op == "Tanh")
    tanh.op = "Hardmax"
    assert isinstance(tanh, gs.Node)
    with pytest.raises(ModelError, match="Hardmax has no gradient here"):
        scorer(tmp_path, [{"input_ids": ids()[:, :5]}]).figures(model, ["W"], "squared")
