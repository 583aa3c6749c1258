from __future__ import annotations

import sys
from pathlib import Path

import pytest

import onnxslim_llm.custom_ops as custom_ops
from onnxslim_llm.custom_ops import native

sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests import op_models


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `isa` runs on each instruction set of this machine."""
    if "isa" not in metafunc.fixturenames:
        return
    if custom_ops.available():
        metafunc.parametrize("isa", native.supported_isas())
    else:
        metafunc.parametrize("isa", [pytest.param("none", marks=pytest.mark.skip(reason=custom_ops.describe()))])
