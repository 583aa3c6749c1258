"""The standard's own decompositions of Attention, with the results that the standard gives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from block_models import model_of
from fusion_checks import run_all
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase

from onnxslim_llm.concepts.attention import is_attention
from onnxslim_llm.rewrite.pipeline import Pipeline

#: Float32 sums of a few dozen terms; float16 has 11 bits.
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 4 * 2.0**-10}


#: onnx 1.23 has 70 of them.
FEWEST = 50


def cases() -> Iterator[TestCase]:
    for case in collect_testcases("Attention"):
        outputs = {output.name for output in case.model.graph.output}
        types = {value.type.tensor_type.elem_type for value in case.model.graph.input}
        plain = "qk_matmul_output" not in outputs and onnx.TensorProto.BFLOAT16 not in types
        # onnx keeps what it collected: cases of other operators come along if another test asked for them.
        ours = case.name.startswith("test_attention_")
        if ours and plain and any(node.op_type == "Softmax" for node in case.model.graph.node):
            yield case


@pytest.mark.slow
def test_standard_decompositions() -> None:
    count = 0
    for case in cases():
        model = model_of(case.model)
        Pipeline("cleanup, fuse_attention, cleanup").run(model)
        assert sum(is_attention(node) for node in model.graph.nodes) == 1, case.name
        inputs, expected = case.data_sets[0]
        feeds = {entry.name: np.asarray(value) for entry, value in zip(case.model.graph.input, inputs, strict=True)}
        for value, actual in zip(expected, run_all(model.to_proto(), feeds).values(), strict=True):
            tolerance = TOLERANCE[np.asarray(value).dtype]
            np.testing.assert_allclose(actual, value, rtol=tolerance, atol=tolerance, err_msg=case.name)
        count += 1
    assert count > FEWEST
