from __future__ import annotations

import pytest
from block_models import model_of, proto

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.passes.lower.convert_opset import ConvertOpset
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.targets import get_target

PORTABLE = Context(target=get_target("portable"))


def model(opset: int) -> Model:
    body = "m = ReduceMean <axes = [1]> (x)  y = Relu (m)" if opset < 18 else "y = Relu (x)"
    return model_of(proto(f"agraph (float[3, 4] x) => (float[?, ?] y) {{ {body} }}", opset, ir_version=8))


def test_nodes_and_imports() -> None:
    converted = model(13)
    record = Pipeline("convert_opset{version=24}").run(converted, PORTABLE)[0]
    assert converted.opset() == 24
    assert record.changed == 1
    assert record.detail["opset"] == [13, 24]
    converted.check()


@pytest.mark.parametrize("version", [0, 21])
def test_the_same_version_is_left(version: int) -> None:
    same = model(21)
    assert not ConvertOpset(version).apply(same, PORTABLE)
    assert same.opset() == 21


def test_an_older_version_is_refused() -> None:
    with pytest.raises(UsageError, match="has opset 21 by now: it cannot be converted down to 20"):
        Pipeline("convert_opset{version=20}").run(model(21), PORTABLE)


def test_a_version_that_the_target_does_not_take() -> None:
    with pytest.raises(UsageError, match="takes opsets from 1 to 26, not 99"):
        Pipeline("convert_opset{version=99}").run(model(21), PORTABLE)
