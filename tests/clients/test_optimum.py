"""optimum's ORTModelForCausalLM loads artifacts as it loads its own exports, and writes the same text as we do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from zoo.access import model_path

if TYPE_CHECKING:
    from pathlib import Path

    from clients.conftest import Artifact, Compiled, Smaller

torch = pytest.importorskip("torch", reason="pip install 'onnxslim-llm[hf]'")
pytest.importorskip("optimum.onnxruntime", reason="pip install 'onnxslim-llm[hf]'")
pytestmark = pytest.mark.torch


def written(artifact: Artifact) -> list[int]:
    """The tokens that transformers writes greedily after the artifact's prompt."""
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(artifact.folder, local_files_only=True)
    prompt, count = torch.tensor([artifact.prompt]), len(artifact.expected)
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, min_new_tokens=count
    )
    return ids[0, len(artifact.prompt) :].tolist()


@pytest.mark.parametrize("recipe", ["safe", "int4-fast"])
def test_the_sample_model(compiled: Compiled, sample_dir: Path, recipe: str) -> None:
    artifact = compiled(sample_dir, "ort-cpu", recipe)
    assert written(artifact) == artifact.expected


# Not qwen3: optimum-onnx 0.1 takes hidden_size / heads for the size of a head, with its own exports, too.
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_exports_of_optimum(compiled: Compiled, name: str) -> None:
    artifact = compiled(model_path(name, "optimum").parent, "ort-cpu", "safe")
    assert written(artifact) == artifact.expected


@pytest.mark.slow
def test_a_model_with_fewer_layers(smaller: Smaller) -> None:
    """Not with fewer heads: optimum-onnx 0.1 takes hidden_size / heads for the size of a head."""
    artifact = smaller(["remove_blocks"], "ort-cpu")
    assert written(artifact) == artifact.expected
