from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import parser
from reference_decoder import DecoderSpec, build

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.verify.cases import DecoderCase
from onnxslim_llm.verify.compare import Comparison, compare
from onnxslim_llm.verify.inputs import make_plan

HEAD = '<ir_version: 9, opset_import: ["": 18]> '
# Two layers summed in another order: logits of magnitude 10 move by some 1e-6 of it.
ROUNDING = 1e-4

Change = Callable[[np.ndarray], np.ndarray]


def changed(proto: onnx.ModelProto, weight: str, change: Change) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    tensor = next(t for t in copy.graph.initializer if t.name == weight)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), weight))
    return copy


def compared(source: onnx.ModelProto, artifact: onnx.ModelProto, **options: object) -> Comparison:
    plain = open_session(source, threads=1, optimise=False)
    plan = make_plan(plain, proto=source, greedy_tokens=24, **options)  # type: ignore[arg-type]
    return compare(plain, open_session(artifact, threads=1), plan)


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    return build(DecoderSpec())


@pytest.mark.parametrize(
    "spec",
    [
        DecoderSpec(),
        DecoderSpec(cache=False),
        DecoderSpec(mask=False),
        DecoderSpec(last_token_only=True),
        DecoderSpec(cache=False, mask=False, positions=False),
    ],
    ids=["cache", "no cache", "no mask", "last token", "ids only"],
)
def test_a_decoder_equals_itself(spec: DecoderSpec) -> None:
    found = compared(build(spec), build(spec))
    assert found.kind == "decoder"
    assert found.total.max_abs <= ROUNDING
    assert found.kl_mean is not None
    assert found.kl_mean < 1e-9
    assert found.top1_agreement == 1.0
    assert found.greedy is not None
    assert found.greedy.first_divergence == (None,) * 4
    assert found.nonfinite == {}
    assert found.tokens > 10


def test_only_real_tokens_are_counted(decoder: onnx.ModelProto) -> None:
    plan = make_plan(open_session(decoder), greedy_tokens=1)
    real = sum(int(mask.sum()) for case in plan.cases for _, mask in case.pieces)  # type: ignore[union-attr]
    everything = sum(mask.size for case in plan.cases for _, mask in case.pieces)  # type: ignore[union-attr]
    assert compared(decoder, decoder).tokens == real < everything


def test_a_small_error_shows_in_every_figure(decoder: onnx.ModelProto) -> None:
    exact = compared(decoder, decoder)
    rng = np.random.default_rng(0)
    noisy = compared(
        decoder,
        changed(decoder, "lm_head.weight", lambda w: w + rng.normal(0, 0.02, w.shape).astype(np.float32)),
    )
    assert noisy.total.max_abs > 100 * exact.total.max_abs
    assert noisy.total.sqnr_db < exact.total.sqnr_db - 40
    assert noisy.total.cosine < exact.total.cosine
    assert noisy.kl_mean is not None
    assert 1e-4 < noisy.kl_mean < 0.1
    assert noisy.kl_max is not None
    assert noisy.kl_max >= noisy.kl_mean


def test_a_broken_cache_shows_only_where_the_cache_is_filled(decoder: onnx.ModelProto) -> None:
    """The artifact hands out a cache of twice the keys: one run is right, the next is wrong."""
    broken = onnx.ModelProto()
    broken.CopyFrom(decoder)
    for node in broken.graph.node:
        for side in (node.input, node.output):
            for i, name in enumerate(side):
                if name == "present.0.key":
                    side[i] = "keys"
    broken.graph.node.append(onnx.helper.make_node("Add", ["keys", "keys"], ["present.0.key"], name="oops"))
    found = compared(decoder, broken)
    assert found.total.max_abs > 0.1
    plain = open_session(decoder, threads=1, optimise=False)
    plan = make_plan(plain)
    only_first = [case for case in plan.cases if len(case.pieces) == 1]  # type: ignore[union-attr]
    quiet = compare(plain, open_session(broken), type(plan)("decoder", tuple(only_first)))
    assert quiet.total.max_abs <= ROUNDING


def test_a_mask_that_is_ignored_shows(decoder: onnx.ModelProto) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(decoder)
    node = next(n for n in broken.graph.node if n.op_type == "And")
    node.op_type, kept = "Or", node.input[0]
    node.input[:] = [kept, kept]
    assert compared(decoder, broken).total.max_abs > 0.1


def test_wrong_positions_show(decoder: onnx.ModelProto) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(decoder)
    frequency = next(t for t in broken.graph.initializer if t.name == "inv_freq")
    frequency.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(frequency) * 1.5, "inv_freq"))
    assert compared(decoder, broken).total.max_abs > 0.1


def test_non_finite_logits_are_named(decoder: onnx.ModelProto) -> None:
    def poison(weight: np.ndarray) -> np.ndarray:
        weight = weight.copy()
        weight[:, 3] = np.inf
        return weight

    found = compared(decoder, changed(decoder, "lm_head.weight", poison))
    assert found.nonfinite["logits"] > 0
    assert found.figures()["nonfinite"] == found.nonfinite["logits"]
    assert found.greedy is not None
    assert found.greedy.first_divergence == (0,) * 4


def test_a_source_without_finite_logits_is_refused(decoder: onnx.ModelProto) -> None:
    nan = changed(decoder, "lm_head.weight", lambda w: np.full_like(w, np.nan))
    with pytest.raises(ModelError, match="no finite logits"):
        compared(nan, decoder)


def test_half_precision_logits(decoder: onnx.ModelProto) -> None:
    half = build(DecoderSpec(dtype="float16"))
    plain = open_session(half, threads=1, optimise=False)
    found = compare(plain, open_session(half, threads=1), make_plan(plain), precision="float16")
    assert found.greedy is not None
    assert found.greedy.first_divergence == (None,) * 4
    assert found.kl_mean is not None
    assert found.kl_mean < 1e-4


def test_another_vocabulary_is_refused(decoder: onnx.ModelProto) -> None:
    with pytest.raises(ModelError, match="vocabulary of 300, the source of 256"):
        compared(decoder, build(DecoderSpec(vocab=300)))


def test_an_artifact_that_is_no_decoder_is_refused(decoder: onnx.ModelProto) -> None:
    other = parser.parse_model(HEAD + "g (float[B] x) => (float[B] y) { y = Neg(x) }")
    with pytest.raises(ModelError, match="not a decoder"):
        compared(decoder, other)


def test_json_is_plain(decoder: onnx.ModelProto) -> None:
    data = json.loads(json.dumps(compared(decoder, decoder).to_json(), allow_nan=False))
    for name in ("max_abs", "max_rel", "sqnr_db", "cosine", "kl_mean", "top1_agreement", "greedy_prefix_match"):
        assert isinstance(data[name], float), name
    assert data["inputs"][0] == "prompt"


def test_progress_counts_to_the_end(decoder: onnx.ModelProto) -> None:
    plain, told = open_session(decoder, threads=1), list[tuple[int, int]]()
    plan = make_plan(plain, greedy_tokens=2)
    compare(plain, plain, plan, progress=lambda d, t: told.append((d, t)))
    runs = sum(len(case.pieces) for case in plan.cases) + 2  # type: ignore[union-attr]
    assert [done for done, _ in told[:runs]] == list(range(1, runs + 1))
    assert told[-1] == (runs, runs)


def test_other_models_output_by_output() -> None:
    source = parser.parse_model(HEAD + "g (float[B, L] x) => (float[B, L] y, int64[2] s) { y = Neg(x) s = Shape(x) }")
    artifact = parser.parse_model(
        HEAD + "g (float[B, L] x) => (float[B, L] y, int64[2] s) {"
        "  n = Neg(x) e = Constant<value_float=0.25>() y = Add(n, e) s = Shape(x) }"
    )
    found = compared(source, artifact)
    assert found.kind == "tensors"
    assert found.outputs["y"].max_abs == pytest.approx(0.25)
    assert found.outputs["s"].max_abs == 0
    assert found.kl_mean is None
    assert found.greedy is None
    json.dumps(found.to_json(), allow_nan=False)


def test_an_unused_input_may_go() -> None:
    source = parser.parse_model(HEAD + "g (float[B] x, float[B] unused) => (float[B] y) { y = Neg(x) }")
    artifact = parser.parse_model(HEAD + "g (float[B] x) => (float[B] y) { y = Neg(x) }")
    assert compared(source, artifact).total.max_abs == 0
    with pytest.raises(ModelError, match="new input 'unused'"):
        compared(artifact, source)


def test_a_lost_output_is_refused() -> None:
    source = parser.parse_model(HEAD + "g (float[B] x) => (float[B] y, float[B] z) { y = Neg(x) z = Abs(x) }")
    artifact = parser.parse_model(HEAD + "g (float[B] x) => (float[B] y) { y = Neg(x) }")
    with pytest.raises(ModelError, match="lacks the output 'z'"):
        compared(source, artifact)


def test_another_shape_is_refused() -> None:
    source = parser.parse_model(HEAD + "g (float[B, L] x) => (float[B, L] y) { y = Neg(x) }")
    artifact = parser.parse_model(HEAD + "g (float[B, L] x) => (float[C, D] y) { y = Transpose<perm=[1, 0]>(x) }")
    with pytest.raises(ModelError) as caught:
        compared(source, artifact)
    assert caught.value.where == "y"


def test_empty_outputs_have_nothing_to_compare() -> None:
    source = parser.parse_model(HEAD + "g (float[B, 0] x) => (float[B, 0] y) { y = Neg(x) }")
    with pytest.raises(ModelError, match="no finite values"):
        compared(source, source)


def test_strings_are_compared_by_equality(tmp_path: object) -> None:
    source = parser.parse_model(
        HEAD + "g (float[B] x, string[1] t) => (float[B] y, string[1] u) { y = Neg(x) u = Identity(t) }"
    )
    from onnxslim_llm.verify.cases import TensorCase
    from onnxslim_llm.verify.inputs import Plan

    case = TensorCase("words", {"x": np.ones(2, np.float32), "t": np.array(["a"], object)})
    session = open_session(source)
    found = compare(session, session, Plan("tensors", (case,)))
    assert found.outputs["u"].max_abs == 0


def test_a_case_that_the_source_cannot_run_is_left_out(decoder: onnx.ModelProto) -> None:
    plain = open_session(decoder, threads=1, optimise=False)
    plan = make_plan(plain, proto=decoder, greedy_tokens=4)
    outside = np.full((1, 4), 1 << 20)
    broken = DecoderCase("ids outside of the vocabulary", ((outside, np.ones_like(outside)),))
    found = compare(plain, open_session(decoder, threads=1), replace(plan, cases=(*plan.cases, broken)))
    assert [name for name, why in found.skipped if "the source itself fails" in why] == [broken.name]
    assert broken.name not in found.inputs
    assert found.total.max_abs <= ROUNDING
