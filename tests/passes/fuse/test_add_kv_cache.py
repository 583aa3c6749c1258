"""A decoder with an added cache says the same, in pieces of any size, as its source says to the whole text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from reference_decoder import DecoderSpec, write
from zoo.access import model_path

from onnxslim_llm.concepts.attention import is_attention
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.model import Model, from_proto, open_model
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.targets import get_target

FUSE = "cleanup, fuse_rms_norm, fuse_layer_norm, fuse_activations, fuse_rotary, fuse_attention, simplify_masks, cleanup"
#: Logits are of the size of 10; two hundred roundings of float32 on the way to them.
TOLERANCE = 10 * 200 * float(np.finfo(np.float32).eps)
LENGTH = 13
MORE = (
    "falcon falcon-gqa gemma gemma2 gpt_neox gptj granite llama3 llama-linear llama-yarn mistral olmo2 phi phi3 qwen2 "
    "qwen3 smollm3 stablelm"
)
CUTS = ([13], [5, 8], [1, 12], [6, 1, 1, 1, 4])


def spec(**options: object) -> DecoderSpec:
    return DecoderSpec(cache=False, **options)  # type: ignore[arg-type]


def source(folder: Path, decoder: DecoderSpec | None = None) -> onnx.ModelProto:
    return onnx.load(write(decoder or spec(), folder / "source.onnx"))


def cached(proto: onnx.ModelProto, passes: str = FUSE) -> tuple[Model, PassRecord]:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    model = from_proto(copy)
    return model, Pipeline(f"{passes}, add_kv_cache").run(model)[-1]


def agree(proto: onnx.ModelProto, model: Model) -> None:
    """Compare on batches of 2, with padding on both sides, cut in several ways."""
    ours = DecoderRunner(open_session(proto, optimise=False))
    theirs = DecoderRunner(open_session(model.to_proto()))
    ids = np.random.default_rng(0).integers(3, 250, (2, LENGTH))
    masks = [np.ones_like(ids)]
    if ours.signature.mask is not None:
        left, right = np.ones_like(ids), np.ones_like(ids)
        left[0, :4], right[0, 9:] = 0, 0
        masks += [left, right]
    for mask in masks:
        expected, _ = ours.extend(ids, None, mask)
        for cuts in CUTS:
            pieces, state = [], None
            for stop, size in zip(np.cumsum(cuts), cuts, strict=True):
                part = slice(stop - size, stop)
                logits, state = theirs.extend(ids[:, part], state, mask[:, part])
                pieces.append(logits)
            real = mask > 0
            got = np.concatenate(pieces, axis=1)
            np.testing.assert_allclose(got[real], expected[real], 0, TOLERANCE, err_msg=str(cuts))
    alone, _ = theirs.extend(ids[:, 5:])
    assert np.abs(alone - expected[:, 5:]).max() > 100 * TOLERANCE, "the text before makes no difference"


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_a_llama(tmp_path: Path, mask: bool, positions: bool) -> None:
    proto = source(tmp_path, spec(mask=mask, positions=positions))
    model, record = cached(proto)
    assert record.changed == record.detail["layers"] == 2
    agree(proto, model)


def test_the_interface(tmp_path: Path) -> None:
    proto = source(tmp_path)
    model, _ = cached(proto)
    inputs = {t.name: list(t.shape) for t in model.graph.inputs}
    assert list(inputs) == [
        *(value.name for value in proto.graph.input),
        *(f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")),
    ]
    assert [t.name for t in model.graph.outputs] == [
        "logits",
        *(f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")),
    ]
    batch, length = inputs["input_ids"]
    assert inputs["past_key_values.1.value"] == [batch, 2, "past_sequence_length", 16]
    assert inputs["attention_mask"] == [batch, f"past_sequence_length + {length}"]
    assert list(model.graph.outputs[-1].shape) == [batch, 2, f"past_sequence_length + {length}", 16]


def test_positions_are_not_computed_for_the_whole_text(tmp_path: Path) -> None:
    """A step costs as much after a long text as after a short one, its mask aside."""
    model, _ = cached(source(tmp_path, spec(positions=False)))
    ranges = [node for node in model.graph.nodes if node.op == "Range"]
    assert ranges
    assert all(not isinstance(node.inputs[0].inputs, list) or node.inputs[0].inputs for node in ranges)
    tables = [node for node in model.graph.nodes if node.op in ("Cos", "Sin")]
    assert not any(user.op == "Slice" for node in tables for user in node.outputs[0].outputs)


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_cleanup_and_lowering_follow(tmp_path: Path, target: str) -> None:
    proto = source(tmp_path)
    model, _ = cached(proto)
    Pipeline(f"cleanup, {get_target(target).lowering}").run(model)
    agree(proto, model)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "exporter"),
    [("llama", "dynamo"), ("gpt2", "script"), ("opt", "dynamo"), ("bloom", "script"), ("gemma3", "script")],
)
def test_exports_without_a_cache(family: str, exporter: str) -> None:
    """Positions from the mask, learned positions, ALiBi, sliding windows."""
    path = model_path(family, exporter)
    model, _ = cached(onnx.load(path))
    agree(onnx.load(path), model)


@pytest.mark.torch
@pytest.mark.zoo
@pytest.mark.parametrize("exporter", ["dynamo", "script"])
@pytest.mark.parametrize("family", MORE.split())
def test_all_families(family: str, exporter: str) -> None:
    test_exports_without_a_cache(family, exporter)


# --- skips and refusals ---


def test_a_model_that_has_one(tmp_path: Path) -> None:
    write(DecoderSpec(), tmp_path / "m.onnx")
    model = open_model(tmp_path / "m.onnx")
    record = Pipeline(f"{FUSE}, add_kv_cache").run(model)[-1]
    assert record.changed == 0
    assert [skip.reason for skip in record.skipped] == ["it has a KV cache already"]


def refusal(proto: onnx.ModelProto, passes: str = FUSE) -> ModelError:
    with pytest.raises(ModelError, match="cannot get a KV cache") as caught:
        cached(proto, passes)
    assert "--add-kv-cache" in caught.value.todo
    return caught.value


def between(proto: onnx.ModelProto, make: Callable[[str, str], list[onnx.NodeProto]]) -> onnx.ModelProto:
    """Put nodes between the embedding and its readers."""
    nodes = list(proto.graph.node)
    (gather,) = (node for node in nodes if node.op_type == "Gather" and node.input[1] == "input_ids")
    old = gather.output[0]
    gather.output[0] = "embedded"
    at = nodes.index(gather) + 1
    nodes[at:at] = make("embedded", old)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def test_attentions_that_were_not_fused(tmp_path: Path) -> None:
    assert "no attention" in refusal(source(tmp_path), "cleanup").what


def test_attentions_whose_mask_is_not_understood(tmp_path: Path) -> None:
    without = FUSE.replace("simplify_masks, ", "")
    assert "not known to be causal" in refusal(source(tmp_path), without).what


def test_tokens_that_see_others_outside_of_attention(tmp_path: Path) -> None:
    proto = source(tmp_path)
    proto.graph.initializer.append(helper.make_tensor("one", TensorProto.INT64, [], [1]))
    between(proto, lambda x, y: [helper.make_node("CumSum", [x, "one"], [y], name="running_sum")])
    error = refusal(proto)
    assert "CumSum" in error.what
    assert error.where == "running_sum"


def test_a_sum_over_the_tokens(tmp_path: Path) -> None:
    proto = source(tmp_path)
    between(
        proto,
        lambda x, y: [
            helper.make_node("ReduceMean", [x], ["mean"], name="mean", axes=[1]),
            helper.make_node("Sub", [x, "mean"], [y]),
        ],
    )
    assert "works along the tokens" in refusal(proto, FUSE).what


def test_a_shift_of_the_tokens(tmp_path: Path) -> None:
    proto = source(tmp_path)
    for name, value in (("start", 0), ("end", -1), ("axis", 1)):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    between(
        proto,
        lambda x, y: [
            helper.make_node("Slice", [x, "start", "end", "axis"], ["front"], name="front"),
            helper.make_node("Slice", [x, "end", "big", "axis"], ["back"], name="back"),
            helper.make_node("Concat", ["back", "front"], [y], axis=1),
        ],
    )
    proto.graph.initializer.append(helper.make_tensor("big", TensorProto.INT64, [1], [2**31]))
    assert "works along the tokens" in refusal(proto).what


def test_the_number_of_tokens_as_a_factor(tmp_path: Path) -> None:
    proto = source(tmp_path)
    between(
        proto,
        lambda x, y: [
            helper.make_node("Shape", ["input_ids"], ["size"]),
            helper.make_node("Gather", ["size", "place"], ["length"]),
            helper.make_node("Cast", ["length"], ["factor"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [x, "factor"], [y]),
        ],
    )
    proto.graph.initializer.append(helper.make_tensor("place", TensorProto.INT64, [], [1]))
    assert "depends on the number of tokens" in refusal(proto).what


def test_positions_that_depend_on_the_text(tmp_path: Path) -> None:
    """RoBERTa's positions count the tokens that are no padding."""
    proto = source(tmp_path)
    for name, value in (("pad", 1), ("along", 1)):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [], [value]))
    between(
        proto,
        lambda x, y: [
            helper.make_node("Equal", ["input_ids", "pad"], ["is_pad"]),
            helper.make_node("Cast", ["is_pad"], ["pads"], to=TensorProto.FLOAT),
            helper.make_node("CumSum", ["pads", "along"], ["count"]),
            helper.make_node("Unsqueeze", ["count", "last"], ["column"]),
            helper.make_node("Add", [x, "column"], [y]),
        ],
    )
    proto.graph.initializer.append(helper.make_tensor("last", TensorProto.INT64, [1], [2]))
    assert "CumSum" in refusal(proto).what


def with_column(proto: onnx.ModelProto, *made: onnx.NodeProto) -> onnx.ModelProto:
    """Add a number for each token, made by nodes of which the last gives "number" [B, S], to the embeddings."""
    for name, shape, value in (("along", [], [1]), ("last", [1], [2]), ("second", [1], [1])):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, shape, value))
    return between(
        proto,
        lambda x, y: [
            helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.FLOAT),
            *made,
            helper.make_node("Unsqueeze", ["number", "last"], ["column"]),
            helper.make_node("Add", [x, "column"], [y]),
        ],
    )


def test_numbers_that_stay_when_the_text_grows(tmp_path: Path) -> None:
    """Positions among the real tokens, as OPT counts them."""
    proto = with_column(source(tmp_path), helper.make_node("CumSum", ["seen", "along"], ["number"]))
    model, _ = cached(proto)
    agree(proto, model)


@pytest.mark.parametrize(
    "made",
    [
        [helper.make_node("CumSum", ["seen", "along"], ["number"], reverse=1, name="culprit")],
        [
            helper.make_node("CumSum", ["seen", "along"], ["count"]),
            helper.make_node("ReduceMax", ["count"], ["most"], axes=[1], name="culprit"),
            helper.make_node("Div", ["count", "most"], ["number"]),
        ],
        [
            helper.make_node("Shape", ["attention_mask"], ["sizes"]),
            helper.make_node("Gather", ["sizes", "second"], ["total"]),
            helper.make_node("Cast", ["total"], ["total_f"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["seen", "total_f"], ["number"], name="culprit"),
        ],
    ],
    ids=["counted from the end", "divided by the largest", "divided by the length"],
)
def test_numbers_that_change_when_the_text_grows(tmp_path: Path, made: list[onnx.NodeProto]) -> None:
    """A cache would keep what was computed with the old ones."""
    error = refusal(with_column(source(tmp_path), *made))
    assert "when the text grows" in error.what
    assert error.where == "culprit"


def test_a_mask_that_depends_on_the_text(tmp_path: Path) -> None:
    """A model that finds the padding by itself would have to know the tokens that are in the cache."""
    proto = source(tmp_path)
    proto.graph.initializer.append(helper.make_tensor("pad", TensorProto.INT64, [], [1]))
    proto.graph.initializer.append(helper.make_tensor("far_below", TensorProto.FLOAT, [], [-1e9]))
    proto.graph.initializer.append(helper.make_tensor("middle", TensorProto.INT64, [2], [1, 2]))
    nodes = list(proto.graph.node)
    softmax = next(node for node in nodes if node.op_type == "Softmax")
    made = [
        helper.make_node("Equal", ["input_ids", "pad"], ["is_pad"]),
        helper.make_node("Cast", ["is_pad"], ["pads"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pads", "far_below"], ["hidden"]),
        helper.make_node("Unsqueeze", ["hidden", "middle"], ["hidden_4d"]),
        helper.make_node("Add", [softmax.input[0], "hidden_4d"], ["masked_scores"]),
    ]
    at = nodes.index(softmax)
    softmax.input[0] = "masked_scores"
    nodes[at:at] = made
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert "depends on the text itself" in refusal(proto).what


def test_an_input_that_no_decoder_has(tmp_path: Path) -> None:
    proto = source(tmp_path)
    proto.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, [1]))
    between(proto, lambda x, y: [helper.make_node("Mul", [x, "gain"], [y])])
    assert "'gain'" in refusal(proto).what


def test_a_fixed_number_of_tokens(tmp_path: Path) -> None:
    proto = source(tmp_path, spec(mask=False, positions=False))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8
    assert "number of tokens is fixed" in refusal(proto).what


def test_an_output_that_is_no_result_of_the_text(tmp_path: Path) -> None:
    proto = source(tmp_path)
    proto.graph.node.append(helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.BOOL))
    proto.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.BOOL, None))
    assert "'seen'" in refusal(proto).what


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    proto = source(tmp_path)
    between(
        proto,
        lambda x, y: [
            helper.make_node("Neg", [x], ["present.0.key"]),
            helper.make_node("Neg", ["present.0.key"], [y]),
        ],
    )
    assert "present.0.key" in refusal(proto, FUSE.replace("cleanup, ", "").replace(", cleanup", "")).what


def test_the_model_is_as_it_was_after_a_refusal(tmp_path: Path) -> None:
    proto = source(tmp_path)
    proto.graph.node.append(helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.BOOL))
    proto.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.BOOL, None))
    model = from_proto(proto)
    Pipeline(FUSE).run(model)
    before = [t.name for t in model.graph.inputs]
    with pytest.raises(ModelError):
        Pipeline("add_kv_cache").run(model)
    assert [t.name for t in model.graph.inputs] == before
    assert sum(is_attention(node) for node in model.graph.nodes) == 2
