"""The models of onnx's own backend tests: the group finds plenty in them, and none of it may matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cleanup_graphs import GROWTH_BYTES, run
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.passes.cleanup.cleanup import Cleanup
from onnxslim_llm.rewrite.context import Context

pytestmark = pytest.mark.slow

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"

#: Folded constants are rounded by numpy, not by the runtime: a few units in the last place, amplified by what follows.
TOLERANCES = {2: (2e-3, 1e-3), 4: (1e-4, 1e-5), 8: (1e-6, 1e-9)}

Case = tuple[str, onnx.ModelProto, list[list[Any]]]


def node_cases() -> list[Case]:
    return [(case.name, case.model, [data[0] for data in case.data_sets or []]) for case in collect_testcases(None)]


def stored_cases() -> list[Case]:
    cases: list[Case] = []
    for path in sorted(DATA.glob("*/*/model.onnx")):
        sets = []
        for folder in sorted(path.parent.glob("test_data_set_*")):
            tensors = [onnx.TensorProto.FromString(f.read_bytes()) for f in sorted(folder.glob("input_*.pb"))]
            sets.append([numpy_helper.to_array(t) for t in tensors])
        cases.append((path.parent.name, onnx.load(path), sets))
    return cases


@pytest.mark.parametrize("collect", [node_cases, stored_cases])
def test_backend_models(collect: Any) -> None:
    cases, changed = collect(), 0
    assert len(cases) > 100
    for name, before, data in cases:
        model = from_proto(onnx.ModelProto.FromString(before.SerializeToString()))
        change = Cleanup().apply(model, Context())
        after = model.to_proto()
        again = from_proto(onnx.ModelProto.FromString(after.SerializeToString()))
        assert not Cleanup().apply(again, Context()), name
        if not change:
            continue
        changed += 1
        assert after.ByteSize() <= before.ByteSize() + GROWTH_BYTES, name
        for inputs in data:
            feeds = {value.name: array for value, array in zip(before.graph.input, inputs, strict=False)}
            try:
                expected = run(before, feeds)
            except Exception:  # the runtime lacks the operator, or the type
                continue
            compare(name, expected, run(after, feeds))
    assert changed > 10


def compare(name: str, expected: dict[str, Any], actual: dict[str, Any]) -> None:
    for output, value in expected.items():
        result = actual[output]
        if not isinstance(value, np.ndarray):
            continue
        assert (value.dtype, value.shape) == (result.dtype, result.shape), name
        if value.dtype.kind == "f":
            rtol, atol = TOLERANCES[value.dtype.itemsize]
            np.testing.assert_allclose(result, value, rtol=rtol, atol=atol, err_msg=name)
        else:
            np.testing.assert_array_equal(result, value, err_msg=name)
