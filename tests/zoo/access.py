"""How tests ask for a model of the zoo."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from zoo.cache import Export, export
from zoo.families import Family, family

__all__ = ["exported", "model_path"]

_NEEDS = {
    "optimum": ("torch", "transformers", "optimum.exporters.onnx"),
    "optimum-eager": ("torch", "transformers", "optimum.exporters.onnx"),
    "dynamo": ("torch", "transformers", "onnxscript"),
    "dynamo-cache": ("torch", "transformers", "onnxscript"),
    "script": ("torch", "transformers", "optimum.exporters.onnx"),
    "genai": ("torch", "transformers", "tokenizers", "onnxruntime_genai"),
}


def model_path(name: str, exporter: str, part: str = "model") -> Path:
    """The ONNX file of family `name` as `exporter` writes it; skips the test without the exporter's packages.

    Raises:
        AssertionError: the exporter failed; with its message.
    """
    made = exported(family(name), exporter)
    assert not made.failure, f"{exporter} cannot export {name}: {made.failure}"
    return made.path(part)


def exported(entry: Family, exporter: str) -> Export:
    """What `exporter` makes of a family; skips the test without its packages."""
    for module in _NEEDS[exporter]:
        if not _installed(module):
            pytest.skip(f"{module} is not installed: pip install 'onnxslim-llm[hf,genai]'")
    return export(entry, exporter)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
