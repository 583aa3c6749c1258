"""onnxruntime-genai loads artifacts with the genai_config.json that compile writes, and writes what we write."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from zoo.access import model_path

from onnxslim_llm.runtime.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from clients.conftest import Artifact, Compiled, Smaller

og = pytest.importorskip("onnxruntime_genai", reason="pip install 'onnxslim-llm[genai]'")


def written(artifact: Artifact) -> list[int]:
    """The tokens that genai writes greedily after the artifact's prompt."""
    length = len(artifact.prompt) + len(artifact.expected)
    generator = _generator(og.Model(str(artifact.folder)), max_length=length, min_length=length, do_sample=False)
    generator.append_tokens(np.array([artifact.prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(artifact.prompt) :]]


def _generator(model: Any, **options: Any) -> Any:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(**options)
    return og.Generator(model, parameters)


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("recipe", ["safe", "int4-fast"])
def test_the_sample_model(compiled: Compiled, sample_dir: Path, target: str, recipe: str) -> None:
    artifact = compiled(sample_dir, target, recipe)
    assert written(artifact) == artifact.expected


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_exports_of_optimum(compiled: Compiled, name: str) -> None:
    artifact = compiled(model_path(name, "optimum").parent, "ort-cpu", "safe")
    assert written(artifact) == artifact.expected


def test_small_weights_of_an_export_of_optimum(compiled: Compiled) -> None:
    settings = ("quantize_weights.min_elements=0",)
    artifact = compiled(model_path("llama", "optimum").parent, "ort-cpu", "int4-fast", settings=settings)
    assert written(artifact) == artifact.expected


@pytest.mark.parametrize("logits", ["all", "last"])
def test_an_export_that_got_its_cache_from_us(compiled: Compiled, logits: str) -> None:
    source = model_path("llama", "dynamo").parent
    artifact = compiled(source, "ort-cpu", "safe", add_kv_cache=True, logits=logits)
    assert written(artifact) == artifact.expected


def test_one_buffer_for_past_and_present(compiled: Compiled) -> None:
    artifact = compiled(model_path("llama", "optimum").parent, "ort-cpu", "safe", kv_cache="shared")
    config = json.loads((artifact.folder / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    assert written(artifact) == artifact.expected


def test_fewer_tokens(smaller: Smaller) -> None:
    """Ids stay what they were; those that were left out are never written."""
    artifact = smaller(["prune_vocabulary"], "ort-cpu")
    kept = json.loads((artifact.folder / "token_map.json").read_text())["kept"]
    assert len(kept) < 2048
    assert written(artifact) == artifact.expected
    assert set(artifact.expected) <= set(kept)


@pytest.mark.parametrize(
    "passes",
    [
        pytest.param(["prune_heads"], marks=pytest.mark.slow),
        pytest.param(["remove_blocks"], marks=pytest.mark.slow),
        ["remove_blocks", "prune_heads", "prune_neurons", "quantize_weights"],
    ],
)
def test_smaller_models(smaller: Smaller, passes: list[str]) -> None:
    """Fewer heads and layers: genai is told, makes caches for them, and writes what we write."""
    artifact = smaller(passes, "ort-cpu")
    decoder = json.loads((artifact.folder / "genai_config.json").read_text())["model"]["decoder"]
    config = json.loads((artifact.folder / "config.json").read_text())
    layers, heads = 4 if "remove_blocks" in passes else 5, 6 if "prune_heads" in passes else 8
    assert (decoder["num_hidden_layers"], decoder["num_attention_heads"]) == (layers, heads)
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (heads // 2, 32)
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (layers, heads)
    assert written(artifact) == artifact.expected


def test_a_prompt_in_two_pieces(compiled: Compiled, sample_dir: Path) -> None:
    """Chunked prefill: the second piece is appended to a cache that is there already."""
    artifact = compiled(sample_dir, "ort-cpu", "safe")
    length = len(artifact.prompt) + len(artifact.expected)
    generator = _generator(og.Model(str(artifact.folder)), max_length=length, min_length=length, do_sample=False)
    for piece in (artifact.prompt[:4], artifact.prompt[4:]):
        generator.append_tokens(np.array([piece], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert [int(token) for token in generator.get_sequence(0)[len(artifact.prompt) :]] == artifact.expected


def test_the_tokenizer_is_found(compiled: Compiled, sample_dir: Path) -> None:
    pytest.importorskip("tokenizers")
    folder = compiled(sample_dir, "ort-cpu", "int4-fast").folder
    text = "def main(self):"
    tokenizer = og.Tokenizer(og.Model(str(folder)))
    ids = [int(token) for token in tokenizer.encode(text)]
    assert ids == list(load_tokenizer(folder).encode(text))
    assert tokenizer.decode(ids) == text
