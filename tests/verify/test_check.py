from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, parser
from reference_decoder import DecoderSpec, build, write

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.verify.check import Verifier, parameter_count, precision_of
from onnxslim_llm.verify.gates import Gate


def rounded(proto: onnx.ModelProto, bits: int, block: int = 32) -> onnx.ModelProto:
    """Every weight matrix rounded to symmetric integers in blocks along K, as plain round-to-nearest does."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if len(tensor.dims) == 2 and "embed" not in tensor.name:
            w = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            blocks = w.reshape(-1, block, w.shape[1])
            scale = np.abs(blocks).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 0.5)
            q = np.clip(np.round(blocks / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            tensor.CopyFrom(onnx.numpy_helper.from_array((q * scale).reshape(w.shape), tensor.name))
    return copy


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    return build(DecoderSpec())


@pytest.fixture(scope="module")
def verifier(decoder: onnx.ModelProto) -> Verifier:
    return Verifier(decoder, threads=1)


def test_the_same_model_passes_every_kind(decoder: onnx.ModelProto, verifier: Verifier) -> None:
    for kind in ("lossless", "int8", "int4"):
        result = verifier.check(open_session(decoder, threads=1), kind)
        assert result.ok, [str(gate) for gate in result.failed]
        assert result.failed == ()


@pytest.mark.parametrize(
    ("bits", "passes", "fails"), [(8, "int8", "lossless"), (4, "int4", "int8"), (3, "int3", "int4")]
)
def test_rounding_passes_its_own_gate_and_not_the_next_stricter_one(
    decoder: onnx.ModelProto, verifier: Verifier, bits: int, passes: str, fails: str
) -> None:
    session = open_session(rounded(decoder, bits), threads=1)
    assert verifier.check(session, passes).ok
    assert not verifier.check(session, fails).ok


def test_the_failed_gate_says_what_and_by_how_much(decoder: onnx.ModelProto, verifier: Verifier) -> None:
    failed = {g.gate: g for g in verifier.check(open_session(rounded(decoder, 2), threads=1), "int8").failed}
    assert set(failed) == {"kl_mean"}
    assert failed["kl_mean"].value is not None
    assert failed["kl_mean"].value > failed["kl_mean"].limit == 3e-3


def test_own_gates_replace_and_add(decoder: onnx.ModelProto, verifier: Verifier) -> None:
    session = open_session(rounded(decoder, 4), threads=1)
    gates = [Gate("kl_mean", 10.0), Gate("cosine", 0.99999, "min")]
    result = verifier.check(session, "int8", extra_gates=gates)
    assert {g.gate: g.ok for g in result.gates} == {"nonfinite": True, "kl_mean": True, "cosine": False}


def test_files_with_external_data(tmp_path: Path) -> None:
    path = write(DecoderSpec(dtype="float16"), tmp_path / "m.onnx")
    verifier = Verifier(path, threads=1)
    assert verifier.precision == "float16"
    result = verifier.check(open_session(path, threads=1), "lossless")
    assert result.ok, [str(gate) for gate in result.failed]


def test_the_json_is_what_the_manifest_needs(decoder: onnx.ModelProto, verifier: Verifier) -> None:
    data = verifier.check(open_session(decoder, threads=1), "lossless").to_json()
    json.dumps(data, allow_nan=False)
    assert data["ok"] is True
    assert {"inputs", "max_abs", "max_rel", "sqnr_db", "cosine", "kl_mean", "top1_agreement"} <= set(data)
    assert {"gate", "limit", "value", "ok"} <= set(data["gates"][0])


def test_models_that_are_no_decoders() -> None:
    text = '<ir_version: 9, opset_import: ["": 18]> g (float[B, 64] x) => (float[B, 32] y) { y = MatMul(x, w) }'
    proto = parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    verifier = Verifier(proto, threads=1)
    for bits, passes, fails in ((8, "int8", "lossless"), (4, "int4", "int8")):
        session = open_session(rounded(proto, bits), threads=1)
        assert verifier.check(session, passes).ok
        assert not verifier.check(session, fails).ok


def test_models_without_greedy_text_have_no_gate_on_it() -> None:
    proto = build(DecoderSpec(cache=False))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 16
    result = Verifier(proto, threads=1).check(open_session(proto, threads=1), "lossless")
    assert result.ok
    assert "greedy_prefix_match" not in {g.gate for g in result.gates}


def test_large_models_write_less_text_for_a_gate_that_is_not_there(
    decoder: onnx.ModelProto, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxslim_llm.verify.check._LARGE", 1)
    session = open_session(decoder, threads=1)
    lengths = [verifier.check(session, kind).comparison.greedy for kind in ("int4", "lossless")]
    assert [g.tokens for g in lengths if g] == [16, 64]


def test_an_unknown_kind_is_refused_before_anything_runs(decoder: onnx.ModelProto, verifier: Verifier) -> None:
    with pytest.raises(UsageError, match="unknown gate kind"):
        verifier.check(open_session(decoder, threads=1), "loss-less")


def test_broken_sources(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    for path in (tmp_path / "m.onnx", tmp_path / "none.onnx"):
        with pytest.raises(ModelError):
            Verifier(path)


def test_precision_and_size(decoder: onnx.ModelProto) -> None:
    assert precision_of(decoder) == "float32"
    assert precision_of(build(DecoderSpec(dtype="float16"))) == "float16"
    brain = onnx.ModelProto()
    brain.graph.initializer.add(name="w", data_type=TensorProto.BFLOAT16, dims=[4, 4])
    assert precision_of(brain) == "bfloat16"
    assert parameter_count(brain) == 16
