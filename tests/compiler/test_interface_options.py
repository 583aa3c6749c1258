"""Options of compile that change what a decoder takes and gives: --add-kv-cache, --logits last."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from reference_decoder import DecoderSpec, write

from onnxslim_llm.compiler import compile as compile_model
from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.signature import DecoderSignature


@pytest.fixture
def uncached(tmp_path: Path) -> Path:
    return write(DecoderSpec(cache=False), tmp_path / "source.onnx")


def signature(folder: Path) -> DecoderSignature:
    return DecoderSignature.of(open_session(folder / "model.onnx"))


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_an_added_cache_is_verified_step_by_step(uncached: Path, tmp_path: Path, target: str) -> None:
    result = compile_model(uncached, tmp_path / "out", recipe="safe", target=target, add_kv_cache=True)
    verified = result.manifest.verify
    assert verified is not None
    assert isinstance(verified.inputs, list)
    assert {"steps after a prompt", "chunks", "steps after left padding"} <= set(verified.inputs)
    assert all(gate.ok for gate in verified.gates)
    assert len(signature(result.path).caches) == 4
    assert (result.path / "genai_config.json").is_file()


def test_without_it_there_are_no_steps_to_verify(uncached: Path, tmp_path: Path) -> None:
    result = compile_model(uncached, tmp_path / "out", recipe="safe")
    assert result.manifest.verify is not None
    assert isinstance(result.manifest.verify.inputs, list)
    assert "chunks" not in result.manifest.verify.inputs


def test_weights_are_quantized_behind_it(uncached: Path, tmp_path: Path) -> None:
    settings = ["quantize_weights.min_elements=0"]
    result = compile_model(
        uncached, tmp_path / "out", recipe="int8", target="ort-cpu", add_kv_cache=True, logits="last", settings=settings
    )
    names = [entry.name for entry in result.manifest.passes]
    assert names.index("fuse_attention") < names.index("add_kv_cache") < names.index("keep_last_logits")
    assert names.index("keep_last_logits") < names.index("quantize_weights")
    assert signature(result.path).last_token_only


def test_the_resolved_recipe_makes_the_same_artifact(uncached: Path, tmp_path: Path) -> None:
    first = compile_model(uncached, tmp_path / "a", recipe="safe", add_kv_cache=True, logits="last", verify="off")
    steps = [step["name"] for step in first.manifest.recipe["passes"]]
    text = "\n".join(f'[[passes]]\nname = "{name}"' for name in steps)
    (tmp_path / "again.toml").write_text(text)
    second = compile_model(uncached, tmp_path / "b", recipe=tmp_path / "again.toml", verify="off")
    hashes = [[entry.sha256 for entry in result.manifest.artifact.files] for result in (first, second)]
    assert hashes[0] == hashes[1]


def test_logits_of_the_last_token(tmp_path: Path) -> None:
    source = write(DecoderSpec(), tmp_path / "source.onnx")
    result = compile_model(source, tmp_path / "out", recipe="safe", logits="last")
    assert signature(result.path).last_token_only
    assert result.manifest.verify is not None
    assert all(gate.ok for gate in result.manifest.verify.gates)
    assert not signature(compile_model(source, tmp_path / "all", recipe="safe").path).last_token_only


def test_a_model_that_has_a_cache_keeps_it(tmp_path: Path) -> None:
    source = write(DecoderSpec(), tmp_path / "source.onnx")
    result = compile_model(source, tmp_path / "out", recipe="safe", add_kv_cache=True, verify="off")
    (entry,) = (entry for entry in result.manifest.passes if entry.name == "add_kv_cache")
    assert entry.changed == 0
    assert entry.skipped[0].reason == "it has a KV cache already"


def test_a_model_that_cannot_get_one_is_an_error(uncached: Path, tmp_path: Path) -> None:
    proto = onnx.load(uncached)
    proto.graph.initializer.append(helper.make_tensor("along", TensorProto.INT64, [], [1]))
    (gather,) = (node for node in proto.graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")
    name, gather.output[0] = gather.output[0], "embedded"
    place = list(proto.graph.node).index(gather) + 1
    proto.graph.node.insert(place, helper.make_node("CumSum", ["embedded", "along"], [name], name="running_sum"))
    onnx.save(proto, tmp_path / "mixing.onnx")
    with pytest.raises(ModelError, match="CumSum") as caught:
        compile_model(tmp_path / "mixing.onnx", tmp_path / "out", recipe="safe", add_kv_cache=True)
    assert caught.value.where == "running_sum"
    assert not (tmp_path / "out").exists()


def test_unknown_logits(uncached: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'some' logits"):
        compile_model(uncached, tmp_path / "out", logits="some")  # type: ignore[arg-type]


def test_nothing_of_it_in_the_manifest_by_default(uncached: Path, tmp_path: Path) -> None:
    result = compile_model(uncached, tmp_path / "out", recipe="safe", verify="off")
    text = json.dumps(result.manifest.recipe)
    assert "add_kv_cache" not in text
    assert "keep_last_logits" not in text
