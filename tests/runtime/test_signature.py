from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest
from onnx import TensorProto, helper
from reference_decoder import DecoderSpec, build

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.signature import DecoderSignature, find_decoder

Value = tuple[str, int, Sequence[str | int | None]]
I64, F32, F16, STR = TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.STRING
IDS: Value = ("input_ids", I64, ["B", "S"])
MASK: Value = ("attention_mask", I64, ["B", "T"])
LOGITS: Value = ("logits", F32, ["B", "S", 100])


def shell(inputs: Sequence[Value], outputs: Sequence[Value]) -> onnx.ModelProto:
    """A model of inputs and outputs only: all that recognition looks at."""
    infos = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    return helper.make_model(helper.make_graph([], "shell", *infos))


def cached(past: Sequence[str], present: Sequence[str], dims: Sequence[str | int | None]) -> onnx.ModelProto:
    after = ["T" if d == "P" else d for d in dims]
    inputs = [IDS, MASK, *((name, F32, dims) for name in past)]
    return shell(inputs, [LOGITS, *((name, F32, after) for name in present)])


@pytest.mark.parametrize("make", [lambda p: p, open_session], ids=["proto", "session"])
def test_optimum_names(make: object) -> None:
    found = DecoderSignature.of(make(build(DecoderSpec(dtype="float16"))))  # type: ignore[operator]
    assert (found.ids, found.mask, found.positions, found.logits) == (
        "input_ids",
        "attention_mask",
        "position_ids",
        "logits",
    )
    assert [(c.past, c.present) for c in found.caches] == [
        (f"past_key_values.{i}.{part}", f"present.{i}.{part}") for i in range(2) for part in ("key", "value")
    ]
    assert found.caches[0].shape == (None, 2, None, 16)
    assert (found.caches[0].batch_axis, found.caches[0].sequence_axis) == (0, 2)
    assert found.caches[0].dtype == "float16"
    assert (found.vocab, found.last_token_only, found.batch, found.length) == (256, False, None, None)


@pytest.mark.parametrize(
    ("past", "present"),
    [
        (["past_key_0", "past_value_0"], ["present_key_0", "present_value_0"]),
        (
            ["past_key_values.0.key", "past_key_values.0.value"],
            ["present_key_values.0.key", "present_key_values.0.value"],
        ),
        (["pastkv.0.k", "pastkv.0.v"], ["presentkv.0.k", "presentkv.0.v"]),
        (["cache_k_0_in", "cache_v_0_in"], ["cache_k_0_out", "cache_v_0_out"]),
    ],
)
def test_other_name_families(past: list[str], present: list[str]) -> None:
    found = DecoderSignature.of(cached(past, present, ["B", 4, "P", 16]))
    assert [(c.past, c.present) for c in found.caches] == list(zip(past, present, strict=True))


def test_keys_and_values_do_not_swap() -> None:
    found = DecoderSignature.of(
        cached(["past_0_value", "past_0_key"], ["present_0_key", "present_0_value"], ["B", 4, "P", 16])
    )
    assert {c.past: c.present for c in found.caches} == {
        "past_0_value": "present_0_value",
        "past_0_key": "present_0_key",
    }


def test_ten_layers_pair_by_number_not_by_order() -> None:
    past = [f"past_key_values.{i}.key" for i in range(11)]
    present = [f"present.{i}.key" for i in sorted(range(11), key=str)]
    found = DecoderSignature.of(cached(past, present, ["B", 4, "P", 16]))
    assert all(c.past.split(".")[1] == c.present.split(".")[1] for c in found.caches)


def test_combined_gpt2_cache() -> None:
    found = DecoderSignature.of(cached(["past_0", "past_1"], ["present_0", "present_1"], [2, "B", 4, "P", 16]))
    assert (found.caches[0].batch_axis, found.caches[0].sequence_axis) == (1, 3)
    assert found.caches[1].shape == (2, None, 4, None, 16)


def test_sequence_before_heads() -> None:
    found = DecoderSignature.of(cached(["past_key_0"], ["present_key_0"], ["B", "P", 4, 16]))
    assert found.caches[0].sequence_axis == 1


def test_unknown_heads_are_taken_from_the_output() -> None:
    proto = shell([IDS, ("past_key_0", F32, ["B", None, "P", 16])], [LOGITS, ("present_key_0", F32, ["B", 4, "T", 16])])
    assert DecoderSignature.of(proto).caches[0].shape == (None, 4, None, 16)


def test_extras_are_known() -> None:
    names = [("token_type_ids", I64, ["B", "S"]), ("cache_position", I64, ["S"]), ("num_logits_to_keep", I64, [])]
    found = DecoderSignature.of(shell([IDS, *names], [LOGITS]))
    assert {e.name: (e.role, e.rank) for e in found.extras} == {
        "token_type_ids": ("zeros_like_ids", 2),
        "cache_position": ("steps", 1),
        "num_logits_to_keep": ("zero", 0),
    }


def test_fixed_sizes_and_last_token_logits() -> None:
    found = DecoderSignature.of(shell([("input_ids", I64, [1, 128])], [("logits", F32, [1, 128, 50])]))
    assert (found.batch, found.length, found.vocab, found.last_token_only) == (1, 128, 50, False)
    found = DecoderSignature.of(shell([IDS], [("logits", F32, ["B", 1, 50])]))
    assert found.last_token_only


def test_unnamed_logits_are_accepted_only_beside_a_cache() -> None:
    past, present = ("past_key_0", F32, ["B", 4, "P", 16]), ("present_key_0", F32, ["B", 4, "T", 16])
    assert DecoderSignature.of(shell([IDS, past], [("output", F32, ["B", "S", 100]), present])).logits == "output"
    assert find_decoder(shell([IDS], [("output", F32, ["B", "S", 100])]))[0] is None


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ([("pixels", F32, [1, 3, 8, 8])], [LOGITS], "no token id input .* only pixels"),
        ([], [LOGITS], "none at all"),
        ([("inputs_embeds", F32, ["B", "S", 64])], [LOGITS], "inputs_embeds"),
        ([("input_ids", F32, ["B", "S"])], [LOGITS], "not integers"),
        ([("input_ids", I64, ["S"])], [LOGITS], r"\['S'\], not integers \[batch, sequence\]"),
        ([IDS, ("encoder_hidden_states", F32, ["B", "E", 8])], [LOGITS], "encoder-decoder"),
        ([IDS, ("temperature", F32, [])], [LOGITS], "'temperature' is none that a decoder has"),
        ([IDS], [("last_hidden_state", F32, ["B", "S", 64])], "no output 'logits', only last_hidden_state"),
        ([IDS], [("logits", F32, ["B", 2])], r"not \[batch, sequence, vocabulary\]"),
        ([IDS], [("logits", I64, ["B", "S", 9])], "not floating point"),
        ([IDS, ("attention_mask", STR, ["B", "T"])], [LOGITS], "attention_mask"),
        ([IDS, ("past_key_0", F32, ["B", 4, "P", 16])], [LOGITS], "no output that continues it"),
        ([IDS, ("past_conv", F32, ["B", 4, 3])], [LOGITS], "no output that continues it"),
        (
            [IDS, ("past_key_0", F32, [1, 4, 64, 16])],
            [LOGITS, ("present_key_0", F32, [1, 4, 64, 16])],
            "fixed size",
        ),
        (
            [IDS, ("past_key_0", F32, ["B", "H", "P", "D"])],
            [LOGITS, ("present_key_0", F32, ["B", "H", "T", "D"])],
            "several unknown dimensions",
        ),
        ([IDS, ("past_key_0", F32, ["B", "P"])], [LOGITS, ("present_key_0", F32, ["B", "T"])], "the shape"),
    ],
)
def test_near_misses_say_why(inputs: list[Value], outputs: list[Value], reason: str) -> None:
    found, why = find_decoder(shell(inputs, outputs))
    assert found is None
    with pytest.raises(ModelError, match=reason):
        DecoderSignature.of(shell(inputs, outputs))
    assert why
