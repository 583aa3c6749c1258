"""The reference implementation of the standard, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx.reference import ReferenceEvaluator


def run(model: Path, feeds: Mapping[str, Any], folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the results by name."""
    evaluator = ReferenceEvaluator(str(model))
    taken = {name: feeds[name] for name in evaluator.input_names}
    return dict(zip(outputs, evaluator.run(list(outputs), taken), strict=True))
