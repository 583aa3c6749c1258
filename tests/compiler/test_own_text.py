"""Recipe int4: by text that the model writes itself, and as int4-fast where there is none to be had."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from reference_decoder import DecoderSpec, build

from onnxslim_llm import compiler
from onnxslim_llm.artifact.manifest import Manifest
from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.own_text import token_count, written_by
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session

WIDTH = 128
TOKENS = 512  # that the models of these tests write: enough rows for their widths
SPEC = DecoderSpec(hidden=WIDTH, head_dim=32, ffn=256, layers=1)
BY_ROLE = "quantize_weights: target_bits = 4.5 does not count without statistics"
OWN = "weights are fitted to text that the model wrote itself"


def _model(text: str, **weights: np.ndarray[Any, Any]) -> onnx.ModelProto:
    graph = parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in (("", 18), ("some.vendor", 1))]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _dense(*shape: int) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(len(shape)).standard_normal(shape) / np.sqrt(WIDTH)).astype(np.float32)


def _mlp() -> onnx.ModelProto:
    return _model("g (float[B, 128] x) => (float[B, 128] y) { a = MatMul (x, A)  b = Relu (a)  y = MatMul (b, B) }",
                  A=_dense(WIDTH, WIDTH), B=_dense(WIDTH, WIDTH))  # fmt: skip


def _convolution() -> onnx.ModelProto:
    return _model(
        "g (float[N, 3, 16, 16] x) => (float[N, 128] y) { a = Conv (x, C)  b = Flatten (a)  y = MatMul (b, A) }",
        C=_dense(8, 3, 5, 5), A=_dense(8 * 12 * 12, WIDTH),
    )  # fmt: skip


def _encoder() -> onnx.ModelProto:
    return _model("""g (int64[B, S] input_ids) => (float[B, S, 128] last_hidden_state)
        { e = Gather (E, input_ids)  last_hidden_state = MatMul (e, A) }""",
        E=_dense(64, WIDTH), A=_dense(WIDTH, WIDTH))  # fmt: skip


def _unknown_operator() -> onnx.ModelProto:
    return _model("""g (int64[B, S] input_ids) => (float[B, S, 64] logits)
        { e = Gather (E, input_ids)  h = some.vendor.Mystery (e)  logits = MatMul (h, A) }""",
        E=_dense(64, WIDTH), A=_dense(WIDTH, 64))  # fmt: skip


def _not_finite() -> onnx.ModelProto:
    """A decoder, to all appearances, whose logits are NaN: the root of negative numbers."""
    return _model("""g (int64[B, S] input_ids) => (float[B, S, 64] logits)
        { e = Gather (E, input_ids)  h = Sqrt (e)  logits = MatMul (h, A) }""",
        E=-1 - np.abs(_dense(64, WIDTH)), A=_dense(WIDTH, 64))  # fmt: skip


NO_TEXT = {
    "mlp": (_mlp, "text cannot be fed to this model"),
    "convolution": (_convolution, "text cannot be fed to this model"),
    "encoder": (_encoder, "text cannot be fed to this model"),
    "unknown operator": (_unknown_operator, "ONNX Runtime cannot open the model"),
    "not finite": (_not_finite, "NaN"),
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxslim_llm.compiler.own_text.FEWEST_TOKENS", TOKENS)
    monkeypatch.setattr("onnxslim_llm.compiler.own_text.MOST_TOKENS", TOKENS)
    monkeypatch.setattr("onnxslim_llm.compiler.calibration.OWN_WINDOW", 16)


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "source.onnx")
    return folder / "source.onnx"


def _compiled(
    source: Path, out: Path, recipe: str | Recipe = "int4", **options: Any
) -> tuple[dict[str, bytes], Manifest]:
    options = {"target": "portable", "jobs": 1, "verify": "off", **options}
    result = compiler.compile(source, out, recipe=recipe, **options)
    files = {file.path for file in result.manifest.artifact.files} - {"tokenizer.json"}
    return {name: (result.path / name).read_bytes() for name in files}, result.manifest


def _bits(manifest: Manifest) -> float:
    step = next(step for step in manifest.passes if step.name == "quantize_weights")
    return float(step.detail["bits_per_weight"])


@pytest.mark.parametrize("recipe", ["int4", "int4-probed"])
@pytest.mark.parametrize("name", NO_TEXT)
def test_without_text_it_is_int4_fast(tmp_path: Path, name: str, recipe: str) -> None:
    make, why = NO_TEXT[name]
    source = _saved(make(), tmp_path)
    files, manifest = _compiled(source, tmp_path / "build", recipe)
    expected, plain = _compiled(source, tmp_path / "expected", "int4-fast")
    assert files == expected
    told = "\n".join(manifest.notes)
    assert "weights are chosen without statistics" in told
    assert why in told
    assert "--calib FILE" in told
    assert BY_ROLE in told
    assert BY_ROLE not in "\n".join(plain.notes)


@pytest.mark.parametrize("habits", [{}, {"cache": False}, {"mask": False, "positions": False}, {"vocab": 32}])
def test_a_decoder_without_tokenizer_writes(tmp_path: Path, habits: dict[str, Any]) -> None:
    source = _saved(build(replace(SPEC, **habits)), tmp_path)
    _, manifest = _compiled(source, tmp_path / "build", verify="fast")
    assert _bits(manifest) <= 4.5
    told = [note for note in manifest.notes if OWN in note]
    assert told == [f"{OWN} ({TOKENS} tokens): --calib FILE with text like what it will read gives better weights"]
    assert BY_ROLE not in "\n".join(manifest.notes)


@pytest.mark.slow
def test_jobs_and_kept_statistics_change_no_byte(tmp_path: Path) -> None:
    source = _saved(build(SPEC), tmp_path)
    first, _ = _compiled(source, tmp_path / "one")
    second, _ = _compiled(source, tmp_path / "two", jobs=2)
    kept, _ = _compiled(source, tmp_path / "kept", statistics=tmp_path / "statistics")
    again, _ = _compiled(source, tmp_path / "again", statistics=tmp_path / "statistics")
    assert first == second == kept == again


def test_fixed_sizes_are_no_hindrance(tmp_path: Path) -> None:
    source = _saved(build(SPEC), tmp_path)
    sizes = [
        "batch=1",
        "prefill:sequence_length=16,past_sequence_length=0",
        "decode:sequence_length=1,past_sequence_length=31",
    ]
    _, manifest = _compiled(source, tmp_path / "fixed", shape=sizes)
    assert len([note for note in manifest.notes if OWN in note]) == 1
    assert BY_ROLE not in "\n".join(manifest.notes)
    assert _bits(manifest) <= 4.5


def test_too_much_work_is_left_alone_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxslim_llm.compiler.probing_cost.MOST_WORK", 1e6)
    source = _saved(build(SPEC), tmp_path)
    files, manifest = _compiled(source, tmp_path / "build")
    expected, _ = _compiled(source, tmp_path / "expected", "int4-fast")
    assert files == expected
    told = "\n".join(manifest.notes)
    assert "multiplications" in told
    assert "--recipe int4-probed" in told
    assert "--calib self" in told
    assert BY_ROLE in told
    asked, _ = _compiled(source, tmp_path / "asked", "int4-probed")
    itself, _ = _compiled(source, tmp_path / "itself", calib="self")
    assert asked == itself != files


def test_the_users_text_is_used_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxslim_llm.compiler.probing_cost.MOST_WORK", 1e6)
    source = _saved(build(SPEC), tmp_path)
    ids = np.random.default_rng(0).integers(0, SPEC.vocab, TOKENS).tolist()
    (tmp_path / "text.jsonl").write_text(json.dumps({"tokens": ids}))
    files, manifest = _compiled(source, tmp_path / "build", calib=tmp_path / "text.jsonl")
    expected, _ = _compiled(source, tmp_path / "expected", "int4-calibrated", calib=tmp_path / "text.jsonl")
    assert files == expected
    assert OWN not in "\n".join(manifest.notes)


def test_what_cannot_be_run_is_told_once(tmp_path: Path) -> None:
    calibrator = Calibrator(_saved(_encoder(), tmp_path), None, tmp_path / "statistics", 1, Silent())
    passes = Recipe.load("int4").build()
    assert calibrator.wanted_by(passes) is None
    assert calibrator.wanted_by(passes) is None
    assert len(calibrator.notes) == 1


def test_asking_for_own_text_of_what_writes_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text cannot be fed to this model"):
        _compiled(_saved(_encoder(), tmp_path), tmp_path / "build", calib="self")
    with pytest.raises(ModelError, match="NaN"):
        _compiled(_saved(_not_finite(), tmp_path), tmp_path / "build", calib="self")


@pytest.mark.slow
def test_a_text_is_written_again_for_another_model(tmp_path: Path) -> None:
    made = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        source = _saved(build(replace(SPEC, seed=seed)), folder)
        made.append(_compiled(source, folder / "build", statistics=tmp_path / "statistics")[0])
        fresh = folder / "fresh"
        assert made[-1] == _compiled(source, fresh)[0]
        shutil.rmtree(fresh)
    assert made[0] != made[1]


def test_the_same_text_is_written_twice(tmp_path: Path) -> None:
    source = _saved(build(SPEC), tmp_path)
    first, second = (written_by(DecoderRunner(open_session(source, threads=n)), 16, 64) for n in (1, 2))
    assert np.array_equal(first, second)
    assert first.shape == (32 * 16,)  # the rows of a batch are always finished


@pytest.mark.parametrize(("ffn", "tokens"), [(64, 4096), (300, 7200), (2000, 16_384)])
def test_the_widest_product_says_how_many_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ffn: int, tokens: int
) -> None:
    monkeypatch.setattr("onnxslim_llm.compiler.own_text.FEWEST_TOKENS", 4096)
    monkeypatch.setattr("onnxslim_llm.compiler.own_text.MOST_TOKENS", 16_384)
    source = _saved(build(replace(SPEC, ffn=ffn)), tmp_path)
    assert token_count(source) == tokens
    monkeypatch.setattr("onnxslim_llm.compiler.own_text._LARGE_BYTES", 1000)
    assert token_count(source) == 4096
