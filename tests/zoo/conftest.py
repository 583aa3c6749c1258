"""Exports that the tests of the harness change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from zoo.access import model_path

Edited = Callable[[Callable[[onnx.GraphProto], None]], Path]


@pytest.fixture
def llama() -> Path:
    """Optimum's export of llama: cache, mask and position ids are inputs."""
    return model_path("llama", "optimum")


@pytest.fixture
def edited(llama: Path, tmp_path: Path) -> Edited:
    """Writes `llama` after a change of its graph."""

    def edit(change: Callable[[onnx.GraphProto], None]) -> Path:
        model = onnx.load(llama)
        change(model.graph)
        path = tmp_path / "changed.onnx"
        onnx.save(model, path)
        return path

    return edit
