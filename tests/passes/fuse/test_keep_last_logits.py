"""Logits of the last token only: the same numbers, and when the classifier is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import model_of, proto, run, skipped, weights
from reference_decoder import DecoderSpec, write

from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session

D, V = 32, 96

HEAD = f"""
    agraph (int64[b, s] ids) => (float[b, s, {V}] logits) {{
        h = Gather (E, ids)
        n = Tanh (h)
        logits = MatMul (n, W)
    }}
"""
FEEDS = {"ids": np.random.default_rng(1).integers(0, V, (2, 7))}


def model(text: str = HEAD, **more: np.ndarray) -> onnx.ModelProto:
    made: dict[str, np.ndarray] = {"E": weights(1, V, D), "W": weights(2, D, V), **more}
    return proto(text, **{name: value for name, value in made.items() if name in text})


def kept(source: onnx.ModelProto, passes: str = "keep_last_logits") -> tuple[Model, PassRecord]:
    result = model_of(source)
    return result, Pipeline(passes).run(result)[-1]


def agree(source: onnx.ModelProto, result: Model, feeds: dict[str, Any] | None = None) -> None:
    whole, last = run(source, feeds or FEEDS), run(result.to_proto(), feeds or FEEDS)
    assert last.shape == (2, 1, V)
    # Products of one row and of many may add their terms in another order.
    np.testing.assert_allclose(last, whole[:, -1:], 0, D * float(np.finfo(np.float32).eps) * 8)


def test_a_classifier() -> None:
    source = model()
    result, record = kept(source)
    assert record.changed == 1
    assert list(result.graph.outputs[0].shape) == ["b", 1, V]
    agree(source, result)


def test_a_classifier_that_shares_the_embedding() -> None:
    source = model(HEAD.replace("logits = MatMul (n, W)", "T = Transpose <perm = [1, 0]> (E)\n logits = MatMul (n, T)"))
    result, _ = kept(source)
    agree(source, result)


def test_bias_scale_and_softcap() -> None:
    chain = """raw = MatMul (n, W)
        biased = Add (bias, raw)
        small = Div (biased, cap)
        bent = Tanh (small)
        logits = Mul (bent, cap)"""
    source = model(HEAD.replace("logits = MatMul (n, W)", chain), bias=weights(3, V), cap=np.array(30, np.float32))
    result, record = kept(source)
    assert record.changed == 1
    agree(source, result)


def test_quantization_follows() -> None:
    source = model()
    result, record = kept(source, "keep_last_logits, quantize_weights{min_elements=0}")
    assert record.changed == 2
    whole = model_of(source)
    Pipeline("quantize_weights{min_elements=0}").run(whole)
    agree(whole.to_proto(), result)


def test_a_decoder_generates_the_same(tmp_path: Path) -> None:
    path = write(DecoderSpec(), tmp_path / "m.onnx")
    result = open_model(path)
    Pipeline("cleanup, keep_last_logits").run(result)
    ours, theirs = DecoderRunner(open_session(path)), DecoderRunner(open_session(result.to_proto()))
    assert theirs.signature.last_token_only
    ids = np.random.default_rng(0).integers(0, 250, (2, 9))
    mine = other = None
    for piece in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        expected, mine = ours.extend(piece, mine)
        got, other = theirs.extend(piece, other)
        np.testing.assert_allclose(got, expected[:, -1:], 0, 1e-4)


# --- skips when ---


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEAD.replace("logits", "y"), "no output 'logits'"),
        (HEAD.replace("MatMul (n, W)", "MatMul (n, n)").replace(f"s, {V}]", "s, s]"), ""),
        (HEAD.replace("logits = MatMul (n, W)", "raw = MatMul (n, W)\n logits = Softmax (raw)"), "Softmax"),
        (
            HEAD.replace(
                "logits = MatMul (n, W)", "raw = MatMul (n, W)\n other = Neg (raw)\n logits = Neg (raw)"
            ).replace("=> (", f"=> (float[b, s, {V}] other, "),
            "'raw' is used elsewhere",
        ),
        (
            HEAD.replace("logits = MatMul (n, W)", "logits = MatMul (n, W)\n other = Neg (logits)").replace(
                "=> (", f"=> (float[b, s, {V}] other, "
            ),
            "reads the logits",
        ),
        (HEAD.replace("[b, s]", "[b, 1]").replace("b, s,", "b, 1,"), "one token already"),
        (HEAD.replace("[b, s]", "[s]").replace("b, s,", "s,"), "not [batch, tokens, vocabulary]"),
    ],
    ids=["no logits", "no weight", "softmax", "shared product", "read logits", "one token", "no batch"],
)
def test_left_alone(text: str, reason: str) -> None:
    if not reason:
        text, reason = text.replace(f"s, {V}]", "s, s]").replace("MatMul (n, n)", "MatMul (n, m)"), "no product"
        text = text.replace("n = Tanh (h)", "n = Tanh (h)\n m = Transpose <perm = [0, 2, 1]> (n)")
    result, record = kept(model(text))
    assert record.changed == 0
    assert reason in next(iter(skipped(record).values()))
    assert "Slice" not in {node.op for node in result.graph.nodes}


def test_tokens_of_all_texts_in_one_row() -> None:
    text = f"""
    agraph (int64[b, s] ids) => (float[b, s, {V}] logits) {{
        h = Gather (E, ids)
        flat = Reshape (h, rows)
        raw = MatMul (flat, W)
        size = Shape (ids)
        shape = Concat <axis = 0> (size, width)
        bent = Tanh (raw)
        logits = Reshape (bent, shape)
    }}
    """
    _, record = kept(model(text, rows=np.array([-1, D]), width=np.array([V])))
    assert record.changed == 0
    assert "Reshape" in next(iter(skipped(record).values()))
