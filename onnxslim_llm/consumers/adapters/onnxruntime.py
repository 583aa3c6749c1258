"""ONNX Runtime on the CPU, with all its graph optimisations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort


def run(model: Path, feeds: Mapping[str, Any], folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the results by name."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    taken = {info.name: feeds[info.name] for info in session.get_inputs()}
    return dict(zip(outputs, session.run(list(outputs), taken), strict=True))
