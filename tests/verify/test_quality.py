from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from reference_decoder import DecoderSpec, build, write

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.verify.figures import log_softmax
from onnxslim_llm.verify.quality import evaluate
from onnxslim_llm.verify.text import read_tokens

# Mean log likelihoods of float32 logits from runs of different length: 1e-6 a token.
RELATIVE = 1e-4


class Bytes:
    """One token a byte: a tokenizer of 256 ids that anyone can check."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def add(a, b):\n    return a + b  # naïve\n" * 3, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(build(DecoderSpec()), threads=1)


def noisy_head(scale: float, **spec: object) -> onnx.ModelProto:
    proto = build(DecoderSpec(**spec))  # type: ignore[arg-type]
    tensor = next(t for t in proto.graph.initializer if t.name == "lm_head.weight")
    weight = onnx.numpy_helper.to_array(tensor)
    noise = np.random.default_rng(0).normal(0, scale, weight.shape)
    tensor.CopyFrom(onnx.numpy_helper.from_array((weight + noise).astype(weight.dtype), tensor.name))
    return proto


def log_likelihoods(session: Session, ids: list[int], window: int, stride: int) -> list[float]:
    """By the definition: every token once, from the first window that holds it, one run a token."""
    runner = DecoderRunner(session)
    found = []
    for position in range(1, len(ids)):
        begin = next(b for b in range(0, len(ids), stride) if b + window > position)
        if begin == position:  # the first token of a window that overlaps nothing
            continue
        logits, _ = runner.prefill(np.array([ids[begin:position]]))
        found.append(float(log_softmax(logits[0, -1:])[0, ids[position]]))
    return found


@pytest.mark.parametrize(("window", "stride"), [(512, None), (16, 8), (16, 16), (10, 1), (2, 1)])
def test_perplexity_is_what_the_definition_says(session: Session, text: Path, window: int, stride: int | None) -> None:
    ids = Bytes().encode(text.read_text(encoding="utf-8"))[:60]
    found = evaluate(session, text, Bytes(), window=window, stride=stride, max_tokens=60)
    expected = log_likelihoods(session, ids, window, stride or window // 2)
    assert found.tokens == len(expected)
    assert found.ppl == pytest.approx(math.exp(-np.mean(expected)), rel=RELATIVE)
    size = len(Bytes().decode(ids).encode())
    assert found.bits_per_byte == pytest.approx(-np.mean(expected) / math.log(2) * 60 / size, rel=RELATIVE)
    assert found.token_sha256 == hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()
    assert found.difference is None


@pytest.mark.parametrize("spec", [{"cache": False}, {"last_token_only": True}, {"mask": False}, {"positions": False}])
def test_every_kind_of_decoder_gives_the_same_figure(session: Session, text: Path, spec: dict[str, bool]) -> None:
    other = open_session(build(DecoderSpec(**spec)), threads=1)  # type: ignore[arg-type]
    found = [evaluate(s, text, Bytes(), window=24, stride=12).ppl for s in (session, other)]
    assert found[1] == pytest.approx(found[0], rel=RELATIVE)


def test_few_rows_at_a_time_give_the_same_figure(session: Session, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(session, text, Bytes(), versus=session, window=32)
    monkeypatch.setattr("onnxslim_llm.verify.quality._LOGIT_BYTES", 5 * 4 * 256)
    pieces = evaluate(session, text, Bytes(), versus=session, window=32)
    assert pieces.ppl == pytest.approx(whole.ppl, rel=RELATIVE)
    assert pieces.tokens == whole.tokens


def test_a_model_next_to_itself(session: Session, text: Path) -> None:
    found = evaluate(session, text, Bytes(), versus=session)
    assert found.difference is not None
    assert found.difference.ppl_ratio == 1.0
    assert found.difference.kld_max == 0.0
    assert found.difference.top1_agreement == 1.0
    assert found.difference.rms_delta_p == 0.0
    assert found.difference.greedy is not None
    assert set(found.difference.greedy.first_divergence) == {None}


def test_a_damaged_model_next_to_its_source(session: Session, text: Path) -> None:
    other = open_session(noisy_head(0.05), threads=1)
    found = evaluate(other, text, Bytes(), versus=session, window=64)
    difference = found.difference
    assert difference is not None
    ids = np.array([Bytes().encode(text.read_text(encoding="utf-8"))[:64]])
    p, q = (log_softmax(DecoderRunner(s).prefill(ids)[0][0, :-1]) for s in (session, other))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    first = evaluate(other, text, Bytes(), versus=session, window=64, max_tokens=64).difference
    assert first is not None
    assert first.kld_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert first.kld_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert first.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert 0 < difference.kld_mean <= difference.kld_p99 <= difference.kld_max
    assert difference.ppl_ratio == pytest.approx(found.ppl / difference.ppl_source, rel=1e-9)
    data = found.to_json()
    json.dumps(data, allow_nan=False)
    assert {"tokens", "ppl_source", "ppl_artifact", "kld_mean", "kld_p99", "top1_agreement"} <= set(data)


def test_a_text_shorter_than_a_window(session: Session, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("ab", encoding="utf-8")
    found = evaluate(session, tmp_path / "short.txt", Bytes(), versus=session)
    assert (found.tokens, found.text_tokens) == (1, 2)
    assert found.difference is not None
    assert found.difference.greedy is None


@pytest.mark.parametrize("content", ["", "a"])
def test_a_text_without_anything_to_predict(session: Session, tmp_path: Path, content: str) -> None:
    (tmp_path / "t.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="at least 2 are needed"):
        evaluate(session, tmp_path / "t.txt", Bytes())


def test_unreadable_texts(session: Session, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such text file"):
        evaluate(session, tmp_path / "none.txt", Bytes())
    (tmp_path / "latin.txt").write_bytes(b"na\xefve and more")
    with pytest.raises(UsageError, match="not UTF-8"):
        evaluate(session, tmp_path / "latin.txt", Bytes())


def test_vocabularies_must_fit(session: Session, text: Path) -> None:
    with pytest.raises(ModelError, match=r"token id \d+, the model's vocabulary has 64"):
        evaluate(open_session(build(DecoderSpec(vocab=64))), text, Bytes())
    with pytest.raises(ModelError, match="vocabularies differ: 300 and 256"):
        evaluate(session, text, Bytes(), versus=open_session(build(DecoderSpec(vocab=300))))


@pytest.mark.parametrize(("window", "stride"), [(0, None), (1, None), (8, 0), (8, 9)])
def test_senseless_windows(session: Session, text: Path, window: int, stride: int | None) -> None:
    with pytest.raises(UsageError, match="window"):
        evaluate(session, text, Bytes(), window=window, stride=stride)


def test_a_model_that_gives_no_logits_for_a_text(text: Path) -> None:
    other = open_session(build(DecoderSpec(cache=False, last_token_only=True)))
    with pytest.raises(ModelError, match="last token only"):
        evaluate(other, text, Bytes())


def test_logits_that_are_not_finite(session: Session, text: Path) -> None:
    with pytest.raises(ModelError, match="not finite"):
        evaluate(open_session(noisy_head(float("nan"))), text, Bytes(), versus=session)


def test_a_fixed_length_limits_the_window(text: Path) -> None:
    proto = build(DecoderSpec(cache=False))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 20
    found = evaluate(open_session(proto, threads=1), text, Bytes())
    assert (found.window, found.stride) == (20, 10)


def test_the_models_own_context_limits_the_window(text: Path, tmp_path: Path) -> None:
    path = write(DecoderSpec(), tmp_path / "model.onnx")
    assert evaluate(path, text, Bytes(), threads=1).window == 512
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 40}')
    assert evaluate(path, text, Bytes(), threads=1).window == 40
    assert evaluate(path, text, Bytes(), threads=1, window=30).window == 30


def test_reading_stops_at_the_limit(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Bytes().encode(text.read_text(encoding="utf-8"))
    assert read_tokens(text, Bytes(), 50).tolist() == whole[:50]
    monkeypatch.setattr("onnxslim_llm.verify.text._CHARS_PER_TOKEN", 1)
    assert read_tokens(text, Bytes(), 50).tolist() == whole[:50]
    assert read_tokens(text, Bytes(), 10**6).tolist() == whole


def test_progress_ends_at_the_last_token(session: Session, text: Path) -> None:
    told: list[tuple[int, int]] = []
    found = evaluate(session, text, Bytes(), window=32, progress=lambda d, t: told.append((d, t)))
    assert told[-1] == (found.text_tokens, found.text_tokens)
    assert told == sorted(told)


def test_the_sample_model_knows_python(sample_dir: Path) -> None:
    """It needs far fewer bits than the frequencies of the bytes alone would; its model card gives the exact figure."""
    text = sample_dir / "heldout.txt"
    counts = np.bincount(np.frombuffer(text.read_bytes(), np.uint8))
    shares = counts[counts > 0] / counts.sum()
    entropy = -float((shares * np.log2(shares)).sum())
    words = load_tokenizer(sample_dir)
    found = evaluate(sample_dir / "model.onnx", text, words, window=256, max_tokens=2000, threads=1)
    assert found.bits_per_byte < 0.6 * entropy
