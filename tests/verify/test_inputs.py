from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser
from reference_decoder import DecoderSpec, build

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.verify.cases import DecoderCase, TensorCase
from onnxslim_llm.verify.inputs import Plan, make_plan

HEAD = '<ir_version: 9, opset_import: ["": 18]> '


def plan_of(proto: onnx.ModelProto, **options: object) -> Plan:
    return make_plan(open_session(proto, threads=1, optimise=False), proto=proto, **options)  # type: ignore[arg-type]


def decoder_case(plan: Plan, name: str) -> DecoderCase:
    case = next(case for case in plan.cases if case.name == name)
    assert isinstance(case, DecoderCase)
    return case


def tensor_feeds(plan: Plan) -> list[dict[str, np.ndarray]]:
    assert all(isinstance(case, TensorCase) for case in plan.cases)
    return [case.feeds for case in plan.cases if isinstance(case, TensorCase)]


def test_a_decoder_is_asked_everything_it_can_do() -> None:
    plan = plan_of(build(DecoderSpec()))
    assert plan.kind == "decoder"
    assert [case.name for case in plan.cases] == [
        "prompt",
        "prompt, batch 2",
        "left padding",
        "right padding",
        "steps after a prompt",
        "chunks",
        "steps after left padding",
    ]
    assert plan.skipped == ()
    assert plan.prompts is not None
    assert plan.prompts.shape == (4, 12)
    assert plan.greedy_tokens == 64


def test_padding_is_on_its_side_and_leaves_real_tokens() -> None:
    plan = plan_of(build(DecoderSpec()))
    (_, left), (_, right) = decoder_case(plan, "left padding").pieces[0], decoder_case(plan, "right padding").pieces[0]
    assert left[1].tolist() == sorted(left[1])
    assert right[1].tolist() == sorted(right[1], reverse=True)
    for mask in (left, right):
        assert mask[0].all()
        assert 0 < mask[1].sum() < mask.shape[1]


def test_steps_are_single_tokens_with_a_filled_cache() -> None:
    pieces = decoder_case(plan_of(build(DecoderSpec())), "steps after left padding").pieces
    assert [ids.shape[1] for ids, _ in pieces] == [24, 1, 1, 1, 1]
    assert not pieces[0][1].all()
    assert all(mask.all() for _, mask in pieces[1:])


@pytest.mark.parametrize(
    ("change", "missing", "reason"),
    [
        ({"mask": False}, {"left padding", "right padding", "steps after left padding"}, "no attention mask"),
        ({"cache": False}, {"steps after a prompt", "chunks", "steps after left padding"}, "no cache"),
        ({"last_token_only": True}, {"right padding"}, "only the last token"),
    ],
)
def test_what_cannot_be_asked_is_said(change: dict[str, bool], missing: set[str], reason: str) -> None:
    everything = {case.name for case in plan_of(build(DecoderSpec())).cases}
    plan = plan_of(build(replace(DecoderSpec(), **change)))
    assert everything - {case.name for case in plan.cases} == missing
    assert any(reason in why for _, why in plan.skipped)


def test_full_asks_more() -> None:
    fast, full = (plan_of(build(DecoderSpec()), level=level) for level in ("fast", "full"))
    assert len(full.cases) == 3 * len(fast.cases)
    assert len({case.name for case in full.cases}) == len(full.cases)
    assert full.prompts is not None
    assert len(full.prompts) == 16


def test_random_ids_are_deterministic_and_in_the_vocabulary() -> None:
    first, second = (plan_of(build(DecoderSpec(vocab=50))) for _ in range(2))
    for a, b in zip(first.cases, second.cases, strict=True):
        assert isinstance(a, DecoderCase)
        assert isinstance(b, DecoderCase)
        for (x, _), (y, _) in zip(a.pieces, b.pieces, strict=True):
            assert np.array_equal(x, y)
            assert 0 <= x.min() <= x.max() < 50


def test_text_is_used_where_given() -> None:
    plan = plan_of(build(DecoderSpec()), token_ids=list(range(200)))
    for case in plan.cases:
        assert isinstance(case, DecoderCase)
        rows = np.concatenate([ids for ids, _ in case.pieces], axis=1)
        assert (np.diff(rows, axis=1) == 1).all()
    short = plan_of(build(DecoderSpec()), token_ids=[7, 8])
    assert {int(i) for case in short.cases for ids, _ in case.pieces for i in ids.ravel()} == {7, 8}  # type: ignore[union-attr]


def test_text_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"token id 300, .* has 256"):
        plan_of(build(DecoderSpec()), token_ids=[1, 300])
    with pytest.raises(UsageError, match="no tokens"):
        plan_of(build(DecoderSpec()), token_ids=[])


def test_fixed_sizes_are_respected() -> None:
    proto = build(DecoderSpec(cache=False))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
        value.type.tensor_type.shape.dim[1].dim_value = 10
    plan = plan_of(proto)
    assert all(ids.shape == (1, 10) for case in plan.cases for ids, _ in case.pieces)  # type: ignore[union-attr]
    assert plan.prompts is None
    assert any("at most 10 tokens" in why for _, why in plan.skipped)


def test_an_encoder_with_logits_is_no_decoder() -> None:
    proto = parser.parse_model(
        HEAD + "g (int64[B,S] input_ids) => (float[B,S,8] logits) {"
        "  x = Gather<axis=0>(table, input_ids) total = ReduceSum<keepdims=1>(x) logits = Add(x, total) }"
    )
    table = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    plan = plan_of(proto)
    assert plan.kind == "tensors"
    assert "depend on later tokens" in plan.why_not_decoder
    assert all(feeds["input_ids"].max() < 8 for feeds in tensor_feeds(plan))


def test_other_models_get_two_shapes() -> None:
    plan = plan_of(parser.parse_model(HEAD + "g (float[B, N] x, float[B, N] y) => (float[B, N] z) { z = Add(x, y) }"))
    first, second = tensor_feeds(plan)
    assert first["x"].shape == first["y"].shape == (1, 8)
    assert second["x"].shape == second["y"].shape == (2, 12)
    assert "input_ids" in plan.why_not_decoder


def test_a_shape_that_the_model_refuses_is_left_out_and_said() -> None:
    text = "g (float[B, N] x) => (float[A, 8] z) { shape = Constant<value_ints=[1, 8]>() z = Reshape(x, shape) }"
    plan = plan_of(parser.parse_model(HEAD + text))
    assert [case.name for case in plan.cases] == ["random, batch 1, length 8"]
    assert plan.skipped[0][0] == "random, batch 2, length 12"


def test_sizes_grow_until_the_model_accepts_them() -> None:
    text = "g (float[B, 1, H, W] x) => (float[B, 1, H2, W2] y) { y = AveragePool<kernel_shape=[30, 30]>(x) }"
    plan = plan_of(parser.parse_model(HEAD + text))
    assert tensor_feeds(plan)[0]["x"].shape == (1, 1, 32, 32)


def test_zero_size_dimensions_run() -> None:
    plan = plan_of(
        parser.parse_model(
            HEAD + "g (float[B, 0] x, float[B] y) => (float[B, 0] z, float[B] w) { z = Neg(x) w = Neg(y) }"
        )
    )
    assert tensor_feeds(plan)[0]["x"].shape == (1, 0)


def test_no_inputs_can_be_made_up() -> None:
    text = "g (float[B] x) => (float[5, 77] z) { shape = Constant<value_ints=[5, 77]>() [stuck] z = Reshape(x, shape) }"
    with pytest.raises(ModelError, match="runs none of the inputs") as caught:
        plan_of(parser.parse_model(HEAD + text))
    assert "stuck" in caught.value.where
    assert "--calib" in caught.value.todo


def test_user_arrays(tmp_path: Path) -> None:
    proto = parser.parse_model(
        HEAD + "g (float[B, 3] x, int64[B] i) => (float[B, 3] z, int64[B] j) { z = Neg(x) j = Neg(i) }"
    )
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3)), i=np.array([1, 2], np.int32))
    np.savez(tmp_path / "b.npz", x=np.zeros((1, 3), np.float32), i=np.array([0]))
    plan = plan_of(proto, arrays=tmp_path)
    assert [case.name for case in plan.cases] == ["a.npz", "b.npz"]
    feeds = tensor_feeds(plan)[0]
    assert (feeds["x"].dtype, feeds["i"].dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"y": np.ones((1, 3))}, "the file has y; the model takes x"),
        ({"x": np.ones((1, 4))}, r"shape \['B', 3\], the file \[1, 4\]"),
        ({"x": np.ones(3)}, "shape"),
        ({"x": np.ones((1, 3), np.int64)}, "the file has int64"),
    ],
)
def test_user_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    proto = parser.parse_model(HEAD + "g (float[B, 3] x) => (float[B, 3] z) { z = Neg(x) }")
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=reason):
        plan_of(proto, arrays=tmp_path / "a.npz")


def test_user_files_that_are_none(tmp_path: Path) -> None:
    proto = parser.parse_model(HEAD + "g (float[B] x, float[B] y) => (float[B] z) { z = Add(x, y) }")
    with pytest.raises(UsageError, match=r"no \.npz"):
        plan_of(proto, arrays=tmp_path)
    with pytest.raises(UsageError, match=r"no \.npz"):
        plan_of(proto, arrays=tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"bad")
    with pytest.raises(UsageError, match="not a readable"):
        plan_of(proto, arrays=tmp_path / "bad.npz")
    np.save(tmp_path / "one.npy", np.ones(2))
    with pytest.raises(UsageError, match=r"2 inputs; an \.npy holds one"):
        plan_of(proto, arrays=tmp_path / "one.npy")
