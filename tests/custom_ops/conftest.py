from __future__ import annotations

import pytest

import onnxslim_llm.custom_ops as custom_ops
from onnxslim_llm.custom_ops import native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `isa` runs on each instruction set of this machine."""
    if "isa" not in metafunc.fixturenames:
        return
    if custom_ops.available():
        metafunc.parametrize("isa", native.supported_isas())
    else:
        metafunc.parametrize("isa", [pytest.param("none", marks=pytest.mark.skip(reason=custom_ops.describe()))])
