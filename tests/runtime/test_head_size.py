from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxslim_llm.runtime.head_size import declared_head_size
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.signature import find_decoder

# The last dimension of the caches has a name only.
MODEL = """
<ir_version: 9, opset_import: ["": 18]>
g (int64[B, S] input_ids, float[B, 2, P, D] "past_key_values.0.key", float[B, 2, P, D] "past_key_values.0.value")
    => (float[B, S, 8] logits, float[B, 2, T, D] "present.0.key", float[B, 2, T, D] "present.0.value")
    <float[8, 8] table>
{
    logits = Gather(table, input_ids)
    "present.0.key" = Identity("past_key_values.0.key")
    "present.0.value" = Identity("past_key_values.0.value")
}
"""
SIZE = 16


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = parser.parse_model(MODEL)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(8, dtype=np.float32), "table"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def declare(file: Path, text: str) -> None:
    (file.parent / "genai_config.json").write_text(text, encoding="utf-8")


def test_a_head_size_that_only_the_configuration_tells(file: Path) -> None:
    declare(file, json.dumps({"model": {"decoder": {"head_size": SIZE}}}))
    signature, why = find_decoder(open_session(file, threads=1))
    assert signature is not None, why
    assert [pair.shape for pair in signature.caches] == [(None, 2, None, SIZE)] * 2


def test_without_the_configuration_it_is_refused(file: Path) -> None:
    signature, why = find_decoder(open_session(file, threads=1))
    assert signature is None
    assert "several unknown dimensions" in why


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"model": 3}',
        '{"model": {"decoder": {"head_size": "16"}}}',
        '{"model": {"decoder": {"head_size": 0}}}',
    ],
)
def test_a_configuration_that_says_nothing(file: Path, text: str) -> None:
    declare(file, text)
    assert declared_head_size(file) is None
