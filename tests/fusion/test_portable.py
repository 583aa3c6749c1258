"""The same fusions with nothing but operators of ai.onnx: its attention, norms and rotary embeddings, or plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from zoo.access import model_path
from zoo.census import fused_sites
from zoo.equality import compare
from zoo.families import FAMILIES, family

Compiled = Callable[..., Path]

_REPRESENTATIVE = frozenset({"llama", "gpt2"})
# What each version brought: Attention, RMSNormalization and RotaryEmbedding in 23, Swish in 24.
_FUSED_OPSETS = (23, 24)


def _cases() -> list[Any]:
    """All opsets for some families, the newest for all."""
    names = [entry.name for entry in FAMILIES if entry.parts("optimum") == ("model",)]
    pairs = [(name, opset) for name in names for opset in (None, *_FUSED_OPSETS)]
    return [
        pytest.param(name, opset, marks=() if name in _REPRESENTATIVE else (pytest.mark.zoo,))
        for name, opset in pairs
        if "optimum" not in {**family(name).refused, **family(name).gaps}
        and (name in _REPRESENTATIVE or opset == max(_FUSED_OPSETS))
    ]


@pytest.mark.parametrize(("name", "opset"), _cases())
def test_a_portable_model_computes_the_same(name: str, opset: int | None, compiled: Compiled) -> None:
    source = model_path(name, "optimum")
    artifact = compiled(source, "portable", opset)
    model = onnx.load(artifact, load_external_data=False)
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
    compare(source, artifact).check()
    if opset in _FUSED_OPSETS:
        assert fused_sites(model) == family(name).sites("model")
