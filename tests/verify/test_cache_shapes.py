"""Arrays as inputs of an artifact whose caches have other shapes than those of its source."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from reference_decoder import DecoderSpec, build

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.passes.prune.prune_heads import PruneHeads
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.verify.cache_shapes import changed_caches, fitted_feeds
from onnxslim_llm.verify.cases import TensorCase
from onnxslim_llm.verify.compare import compare
from onnxslim_llm.verify.inputs import Plan

SPEC = DecoderSpec(layers=1)


@pytest.fixture(scope="module")
def source() -> Session:
    return open_session(build(SPEC), threads=1)


@pytest.fixture(scope="module")
def smaller() -> Session:
    model = from_proto(build(SPEC))
    (record,) = Pipeline([*Recipe.load("safe").build(), PruneHeads(share=0.5, refit=False)]).run(model, Context())[-1:]
    assert record.changed == 1
    return open_session(model.to_proto(), threads=1)


def case(source: Session, past: int = 0) -> TensorCase:
    feeds = DecoderRunner(source).arrays(np.arange(5)[None])
    if past:
        feeds |= {n: np.ones((1, 2, past, 16), np.float32) for n in feeds if n.startswith("past")}
        feeds["attention_mask"] = np.ones((1, past + 5), np.int64)
    return TensorCase("given", feeds)


def test_logits_are_compared_and_caches_are_not(source: Session, smaller: Session) -> None:
    assert changed_caches(source, smaller) == {"present.0.key", "present.0.value"}
    found = compare(source, smaller, Plan("tensors", (case(source),)))
    assert set(found.outputs) == {"logits"}
    assert found.total.max_abs > 0


def test_caches_of_the_same_shapes_are_compared(source: Session) -> None:
    assert not changed_caches(source, source)
    found = compare(source, source, Plan("tensors", (case(source, past=3),)))
    assert set(found.outputs) == {"logits", "present.0.key", "present.0.value"}


def test_filled_caches_do_not_fit(source: Session, smaller: Session) -> None:
    with pytest.raises(ModelError, match=r"is \[1, 2, 3, 16\] for the source, the artifact wants") as caught:
        fitted_feeds(case(source, past=3).feeds, smaller)
    assert caught.value.where == "past_key_values.0.key"


def test_a_lost_output_that_is_no_cache_is_missed(source: Session, smaller: Session) -> None:
    proto = build(SPEC)
    kept = proto.graph.node[-1].output[0]
    proto.graph.output.append(helper.make_tensor_value_info("again", onnx.TensorProto.FLOAT, None))
    proto.graph.node.append(helper.make_node("Identity", [kept], ["again"]))
    with pytest.raises(ModelError, match="lacks the output 'again'"):
        compare(open_session(proto, threads=1), smaller, Plan("tensors", (case(source),)))
