"""Network, evaluation and exporters, on a random model small enough for a test."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")

from models.evaluate import bits_per_byte  # noqa: E402
from models.export import MAX_DELTA, deltas, export, random_cache  # noqa: E402
from models.llama import Llama, LlamaConfig, load_hf, save_hf  # noqa: E402
from models.train import Recipe  # noqa: E402

pytestmark = pytest.mark.torch

TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Llama:
    """Larger weights than at the start of training, so that attention is far from even."""
    torch.manual_seed(2)
    drawn = Llama(TINY)
    for parameter in drawn.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_hf(drawn, tmp_path / "hf")
    return load_hf(tmp_path / "hf")


def test_stored_weights_are_bfloat16_exactly(model: Llama, tmp_path: Path) -> None:
    for tensor in model.state_dict().values():
        assert torch.equal(tensor, tensor.to(torch.bfloat16).float())
    save_hf(model, tmp_path / "again")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "again"))
    assert first == second


def test_step_with_cache_equals_the_training_forward(model: Llama) -> None:
    ids = torch.randint(0, TINY.vocab_size, (2, 20))
    with torch.no_grad():
        whole = model.logits(model.hidden(ids))
        mask = torch.ones(2, 20, dtype=torch.int64)
        positions = torch.arange(20).repeat(2, 1)
        first, cache = model(ids[:, :13], mask[:, :13], positions[:, :13], random_cache(TINY, 2, 0))
        second, _ = model(ids[:, 13:], mask, positions[:, 13:], cache)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=MAX_DELTA)


@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_both_exporters_match_torch(model: Llama, tmp_path: Path, exporter: str) -> None:
    if exporter == "dynamo":
        pytest.importorskip("onnxscript")
    path = tmp_path / f"{exporter}.onnx"
    export(model, path, exporter)
    assert max(delta for _, delta in deltas(model, path)) < MAX_DELTA


@pytest.mark.parametrize(("window", "stride"), [(512, 256), (16, 8), (16, 15), (7, 3)])
def test_bits_per_byte_scores_every_token_once(window: int, stride: int) -> None:
    """A model of all zeros gives every token log2(vocab) bits, however the windows lie."""
    model = Llama(TINY)
    for parameter in model.parameters():
        parameter.data.zero_()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = " ".join(f"w{i * 7 % 64}" for i in range(100))
    expected = 100 * math.log2(64) / len(text)
    assert bits_per_byte(model, tokenizer, text, window, stride) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_rises_then_falls() -> None:
    recipe = Recipe()
    scales = [recipe.lr_scale(i / 1000) for i in range(1001)]
    peak = scales.index(max(scales))
    assert peak == pytest.approx(1000 * recipe.warmup, abs=2)
    assert scales[peak] == pytest.approx(1)
    assert scales[-1] == pytest.approx(recipe.final_lr)
    assert all(a >= b for a, b in itertools.pairwise(scales[peak:]))
