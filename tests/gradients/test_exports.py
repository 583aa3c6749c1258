"""Whole models: the logits of ONNX Runtime, as exported and with everything fused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from zoo.access import model_path

torch = pytest.importorskip("torch")

from onnxslim_llm.gradients.executor import Executor  # noqa: E402
from onnxslim_llm.ir.model import open_model  # noqa: E402
from onnxslim_llm.recipe import Recipe  # noqa: E402
from onnxslim_llm.rewrite.context import Context  # noqa: E402
from onnxslim_llm.rewrite.pipeline import Pipeline  # noqa: E402
from onnxslim_llm.runtime.decoder import DecoderRunner  # noqa: E402
from onnxslim_llm.runtime.session import open_session  # noqa: E402

#: Logits of up to some ten, after some dozen float32 operations in another order: 1e-7 each, relative.
TOLERANCE = 1e-4


def compare(path: Path) -> None:
    runner = DecoderRunner(open_session(path, threads=1))
    feeds = runner.arrays(np.random.default_rng(0).integers(0, runner.vocab, (2, 19)))
    logits = runner.signature.logits
    expected = runner.session.run(feeds, [logits])[logits]
    for fused in (False, True):
        model = open_model(path)
        if fused:
            Pipeline(Recipe.load("safe").build()).run(model, Context())
        with torch.no_grad():
            found = Executor(model).run(feeds, outputs=[logits])[logits]
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_sample_model(sample_dir: Path) -> None:
    compare(sample_dir / "model.onnx")


@pytest.mark.zoo
@pytest.mark.parametrize("exporter", ["optimum", "optimum-eager", "dynamo", "dynamo-cache", "script"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", "gemma2", "phi3", "bloom", "falcon"])
def test_exports(family: str, exporter: str) -> None:
    compare(model_path(family, exporter))


def test_the_loss_of_a_model_falls_against_its_gradient(sample_dir: Path) -> None:
    runner = DecoderRunner(open_session(sample_dir / "model.onnx", threads=1))
    ids = np.frombuffer((sample_dir / "calib.txt").read_bytes()[:64], np.uint8).astype(np.int64)[None]
    feeds, logits = runner.arrays(ids), runner.signature.logits
    executor = Executor(open_model(sample_dir / "model.onnx"))
    matrices = [name for name in executor.weights if executor.weight(name).dim() == 2]
    free = {name: executor.weight(name).clone().requires_grad_() for name in matrices}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        found = executor.run(feeds, values, [logits])[logits]
        return torch.nn.functional.cross_entropy(found[0, :-1], torch.from_numpy(ids[0, 1:]))

    before = loss(free)
    before.backward()
    slope = sum(float(tensor.grad.square().sum()) for tensor in free.values() if tensor.grad is not None)
    before = before.detach()
    step = 1e-3 * float(before) / slope
    with torch.no_grad():
        after = loss({n: t - step * t.grad for n, t in free.items() if t.grad is not None})
    # The first order: the loss falls by a thousandth; the rest is the curvature.
    assert 0.9e-3 < float(before - after) / float(before) < 1.1e-3
