"""compile --kv-cache: artifacts that extend their cache in place, verified against the source like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from reference_decoder import DecoderSpec, write

import onnxslim_llm as osl
from onnxslim_llm.cli.app import app
from onnxslim_llm.errors import UsageError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.generate import generate
from onnxslim_llm.runtime.session import open_session

SPEC = DecoderSpec()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.onnx"
    write(SPEC, path)
    return path


def names(path: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(path, load_external_data=False).graph
    return [i.name for i in graph.input], [o.name for o in graph.output]


def test_shared(source: Path, tmp_path: Path) -> None:
    result = osl.compile(source, tmp_path / "out", recipe="safe", target="ort-cpu", kv_cache="shared")
    model = result.path / "model.onnx"
    assert result.manifest.artifact.ops["com.microsoft::GroupQueryAttention"] == SPEC.layers
    assert result.manifest.verify is not None
    assert all(gate.ok for gate in result.manifest.verify.gates)
    assert names(model) == names(source)
    ours, theirs = (DecoderRunner(open_session(path, threads=1)) for path in (model, source))
    assert ours.signature.in_place
    prompt = [5, 6, 7]
    expected = list(generate(theirs, prompt, max_new_tokens=80))
    assert list(generate(ours, prompt, max_new_tokens=80)) == expected
    steps = {record.name: record for record in result.manifest.passes}
    assert steps["lower_kv_cache"].options == {"cache": "shared"}


def test_int8_and_what_it_costs(source: Path, tmp_path: Path) -> None:
    result = osl.compile(source, tmp_path / "out", recipe="safe", target="ort-cpu", kv_cache="int8")
    verified = result.manifest.verify
    assert verified is not None
    assert verified.kl_mean is not None
    assert verified.kl_mean > 0
    graph = onnx.load(result.path / "model.onnx").graph
    kinds = {i.type.tensor_type.elem_type for i in graph.input if "past" in i.name}
    assert kinds == {onnx.TensorProto.INT8}
    assert names(result.path / "model.onnx") == names(source)
    assert any("the int8 KV cache costs a mean KL divergence of" in note for note in result.manifest.notes)
    assert any("random tokens" in note for note in result.manifest.notes)
    runner = DecoderRunner(open_session(result.path / "model.onnx", threads=1))
    assert len(list(generate(runner, [1, 2, 3], max_new_tokens=8))) == 8


def test_a_target_without_the_operator(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no operator that extends a cache in place"):
        osl.compile(source, tmp_path / "out", recipe="safe", target="portable", kv_cache="shared")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(DecoderSpec(cache=False), path)
    with pytest.raises(UsageError, match="no attention with a KV cache"):
        osl.compile(path, tmp_path / "out", recipe="safe", target="ort-cpu", kv_cache="shared")


def test_an_unknown_kind(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown kind of cache"):
        osl.compile(source, tmp_path / "out", kv_cache="paged")  # type: ignore[arg-type]


def test_from_the_command_line(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["compile", str(source), "-o", str(out), "--recipe", "safe", "--target", "ort-cpu", "--verify", "off"]
    done = CliRunner().invoke(app, [*words, "--kv-cache", "shared", "-q"])
    assert done.exit_code == 0, done.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert "lower_kv_cache" in [step["name"] for step in manifest["passes"]]
    cache = np.dtype(np.float32)
    assert {pair.dtype for pair in DecoderRunner(open_session(out / "model.onnx")).signature.caches} == {cache}
