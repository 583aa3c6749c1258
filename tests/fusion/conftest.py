"""Models of the zoo, compiled once a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import onnxslim_llm as osl

Compiled = Callable[[Path], Path]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """What the recipe `safe` makes of a model for ONNX Runtime; the same artifact for every test that asks."""
    made: dict[Path, Path] = {}

    def build(source: Path) -> Path:
        if source not in made:
            folder = tmp_path_factory.mktemp("compiled") / "artifact"
            osl.compile(source, folder, recipe="safe", target="ort-cpu", verify="off")
            made[source] = folder / "model.onnx"
        return made[source]

    return build
