from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser
from reference_decoder import DecoderSpec, build

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.signature import DecoderSignature

# Logits of magnitude 10 through two layers, summed in another order: 1e-6 relative, ten times that allowed.
ROUNDING = 1e-4
# The same in float16 (2^-11), where every intermediate result is rounded: some 10 roundings of the largest logit.
ROUNDING_HALF = 0.05

SPECS = {
    "cache": DecoderSpec(),
    "no cache": DecoderSpec(cache=False),
    "ids only": DecoderSpec(cache=False, mask=False, positions=False),
    "no mask": DecoderSpec(mask=False),
    "no positions": DecoderSpec(positions=False),
    "last token": DecoderSpec(last_token_only=True),
    "float16": DecoderSpec(dtype="float16"),
}


def runner_of(spec: DecoderSpec) -> DecoderRunner:
    return DecoderRunner(open_session(build(spec), threads=1))


def random_ids(shape: tuple[int, int], vocab: int = 256) -> np.ndarray:
    return np.random.default_rng(5).integers(0, vocab, shape)


def tolerance(spec: DecoderSpec) -> float:
    return ROUNDING if spec.dtype == "float32" else ROUNDING_HALF


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_steps_and_chunks_give_the_logits_of_one_run(spec: DecoderSpec) -> None:
    runner, ids = runner_of(spec), random_ids((2, 9))
    whole, state = runner.prefill(ids)
    assert whole.shape == (2, 1 if spec.last_token_only else 9, 256)
    assert whole.dtype == spec.dtype
    assert state.length == 9
    for chunk in (1, 4):
        parts, after = runner.prefill(ids, chunk=chunk)
        assert parts.shape == whole.shape
        assert np.abs(parts.astype(np.float64) - whole).max() <= tolerance(spec)
        assert after.length == 9


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["cache", "no cache", "no positions", "float16"])
def test_padding_does_not_change_real_tokens(name: str, side: str) -> None:
    spec = SPECS[name]
    runner, ids = runner_of(spec), random_ids((2, 9))
    plain, _ = runner.prefill(ids)
    pad = (3, 0) if side == "left" else (0, 3)
    mask = np.pad(np.ones_like(ids), ((0, 0), pad))
    padded, _ = runner.prefill(np.pad(ids, ((0, 0), pad)), mask=mask)
    real = padded[mask > 0].reshape(plain.shape)
    assert np.abs(real.astype(np.float64) - plain).max() <= tolerance(spec)


def test_a_step_after_left_padding_continues_the_real_text() -> None:
    runner, ids = runner_of(DecoderSpec()), random_ids((1, 6))
    plain, _ = runner.prefill(ids)
    _, state = runner.prefill(np.pad(ids[:, :5], ((0, 0), (4, 0))), mask=np.array([[0] * 4 + [1] * 5]))
    step, _ = runner.extend(ids[:, 5:], state)
    assert np.abs(step[:, 0] - plain[:, 5]).max() <= ROUNDING


def test_a_state_can_be_used_twice() -> None:
    runner, ids = runner_of(DecoderSpec()), random_ids((1, 6))
    _, state = runner.prefill(ids[:, :5])
    first, _ = runner.extend(ids[:, 5:], state)
    runner.extend(np.array([[7]]), state)
    again, _ = runner.extend(ids[:, 5:], state)
    assert np.array_equal(first, again)


def test_the_cache_is_really_used() -> None:
    """Without it, a step would see only its own token."""
    runner, ids = runner_of(DecoderSpec()), random_ids((1, 6))
    _, state = runner.prefill(ids[:, :5])
    with_past, _ = runner.extend(ids[:, 5:], state)
    alone, _ = runner.extend(ids[:, 5:])
    assert np.abs(with_past - alone).max() > 100 * ROUNDING


def test_masks_of_rank_four() -> None:
    """[B, 1, S, T]: what the model adds to its scores is what it gets, once as numbers and once as booleans."""
    for element, visible, hidden in ((TensorProto.FLOAT, 0.0, np.finfo(np.float32).min), (TensorProto.BOOL, 1, 0)):
        infos = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info("attention_mask", element, ["B", 1, "S", "T"]),
        ]
        # The logits are the mask itself: vocabulary = T.
        cast = helper.make_node("Cast", ["attention_mask"], ["wide"], to=TensorProto.FLOAT)
        squeeze = helper.make_node("Squeeze", ["wide", "axis"], ["logits"])
        axis = onnx.numpy_helper.from_array(np.array([1]), "axis")
        out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "S", "T"])
        graph = helper.make_graph([cast, squeeze], "g", infos, [out], [axis])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        logits, _ = DecoderRunner(open_session(proto)).extend(np.zeros((1, 3), np.int64), mask=np.array([[0, 1, 1]]))
        expected = [[hidden, hidden, hidden], [hidden, visible, hidden], [hidden, visible, visible]]
        assert logits[0].tolist() == expected


def test_extra_inputs_are_filled() -> None:
    proto = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (int64[B,S] input_ids, int64[S] cache_position, int64[B,S] '
        "token_type_ids, int64 num_logits_to_keep) => (float[B,S,V] logits) {"
        "  a = Add(input_ids, cache_position) b = Add(a, token_type_ids) c = Add(b, num_logits_to_keep)"
        "  axes = Constant<value = int64[1] {2}>() d = Unsqueeze(c, axes) logits = Cast<to=1>(d) }"
    )
    runner = DecoderRunner(open_session(proto))
    logits, _ = runner.extend(np.array([[0, 0]]))
    assert logits[0, :, 0].tolist() == [0.0, 1.0]


def test_a_fixed_length_without_cache_is_filled_up() -> None:
    spec = DecoderSpec(cache=False)
    proto = build(spec)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 12
    fixed, free = DecoderRunner(open_session(proto)), runner_of(spec)
    ids = random_ids((1, 7))
    expected, _ = free.prefill(ids)
    got, _ = fixed.prefill(ids)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= ROUNDING
    with pytest.raises(ModelError, match="at most 12 tokens"):
        fixed.prefill(random_ids((1, 13)))


def test_a_model_of_one_token_a_run_prefills_step_by_step() -> None:
    proto = build(DecoderSpec())
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name in ("input_ids", "position_ids", "logits"):
            value.type.tensor_type.shape.dim[1].dim_value = 1
    runner, ids = DecoderRunner(open_session(proto)), random_ids((1, 5))
    expected, _ = runner_of(DecoderSpec()).prefill(ids)
    got, _ = runner.prefill(ids)
    assert np.abs(got - expected).max() <= ROUNDING
    with pytest.raises(ModelError, match="exactly 1 tokens"):
        runner.extend(ids)


def test_vocabulary_is_asked_if_the_graph_does_not_say_it() -> None:
    proto = build(DecoderSpec(vocab=300))
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "V"
    assert DecoderRunner(open_session(proto)).vocab == 300


def test_causal_and_not() -> None:
    assert runner_of(DecoderSpec(cache=False)).is_causal()
    encoder = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (int64[B,S] input_ids) => (float[B,S,4] logits) {'
        "  x = Cast<to=1>(input_ids) total = ReduceSum<keepdims=1>(x) y = Add(x, total)"
        "  axes = Constant<value = int64[1] {2}>() z = Unsqueeze(y, axes) logits = Concat<axis=2>(z, z, z, z) }"
    )
    assert not DecoderRunner(open_session(encoder)).is_causal()


def test_padding_without_a_mask_is_refused() -> None:
    with pytest.raises(ModelError, match="no attention mask"):
        runner_of(SPECS["no mask"]).extend(random_ids((1, 3)), mask=np.array([[0, 1, 1]]))


@pytest.mark.parametrize("bad", [256, -1])
def test_ids_outside_of_the_vocabulary_are_refused(bad: int) -> None:
    with pytest.raises(ModelError, match=rf"token id {bad} is outside .* 256") as caught:
        runner_of(DecoderSpec()).extend(np.array([[1, bad]]))
    assert "tokenizer" in caught.value.todo


@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (3,)])
def test_empty_or_flat_ids_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="not empty"):
        runner_of(DecoderSpec()).extend(np.zeros(shape, np.int64))


def test_a_fixed_batch_is_respected() -> None:
    runner = runner_of(DecoderSpec())
    runner.signature = replace(runner.signature, batch=2)
    with pytest.raises(ModelError, match="batches of 2, not 1"):
        runner.extend(random_ids((1, 3)))


def test_what_is_no_decoder_is_refused() -> None:
    proto = parser.parse_model('<ir_version: 9, opset_import: ["": 18]> g (float[N] x) => (float[N] y) { y = Neg(x) }')
    with pytest.raises(ModelError, match="not a decoder"):
        DecoderRunner(open_session(proto))


def test_logits_of_a_wrong_shape_are_refused() -> None:
    runner = runner_of(DecoderSpec())
    wrong = DecoderSignature.of(runner.session)
    runner.signature = replace(wrong, logits="present.0.key")
    with pytest.raises(ModelError, match=r"'present.0.key' has the shape"):
        runner.extend(random_ids((1, 3)))
