"""Models of the zoo, compiled once a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import onnxslim_llm as osl

Compiled = Callable[..., Path]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """What the recipe `safe` makes of a model; the same artifact for every test that asks."""
    made: dict[tuple[Path, str, int | None], Path] = {}

    def build(source: Path, target: str = "ort-cpu", opset: int | None = None) -> Path:
        key = source, target, opset
        if key not in made:
            folder = tmp_path_factory.mktemp("compiled") / "artifact"
            osl.compile(source, folder, recipe="safe", target=target, opset=opset, verify="off")
            made[key] = folder / "model.onnx"
        return made[key]

    return build
