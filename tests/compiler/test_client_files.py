"""Which client files are written beside an artifact, and when a cache counts as growing in place."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import parser
from reference_decoder import DecoderSpec, write

from onnxslim_llm.artifact.manifest import read_manifest
from onnxslim_llm.compiler import compile as compile_model
from onnxslim_llm.compiler.client_files import write_client_files

#: The interface of a decoder of one layer; it is only looked at, never run.
_SHELL = """
<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
g (int64[B, S] input_ids, float[B, 2, P, 8] past_key_values_0_key, float[B, 2, P, 8] past_key_values_0_value)
  => (float[B, S, 32] logits, float[B, 2, T, 8] present_0_key, float[B, 2, T, 8] present_0_value) {{
  x = Cast <to = 1> (input_ids)
  lengths = Cast <to = 6> (input_ids)
  {body}
}}
"""
_GQA = """
  logits, present_0_key, present_0_value = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2>
    (x, x, x, past_key_values_0_key, past_key_values_0_value, lengths, lengths)
"""
_CONCAT = """
  logits = Identity (x)
  present_0_key = Concat <axis = 2> (past_key_values_0_key, past_key_values_0_key)
  present_0_value = Concat <axis = 2> (past_key_values_0_value, past_key_values_0_value)
"""
_EXCHANGED = _GQA.replace("past_key_values_0_key, past_key_values_0_value", "past_key_values_0_value, x")
_COUNTED = "past_size = Shape (past_key_values_0_key)" + _GQA


@pytest.mark.parametrize(("body", "shared"), [(_GQA, True), (_CONCAT, False), (_EXCHANGED, False), (_COUNTED, False)])
def test_the_buffer_is_shared_only_where_nothing_else_looks_at_it(tmp_path: Path, body: str, shared: bool) -> None:
    onnx.save(parser.parse_model(_SHELL.format(body=body)), tmp_path / "model.onnx")
    written, _ = write_client_files(tmp_path / "model.onnx", tmp_path)
    assert written == ["genai_config.json"]
    search = json.loads((tmp_path / "genai_config.json").read_text())["search"]
    assert search["past_present_share_buffer"] is shared


def test_a_compile_writes_it_and_answers_for_it(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write(DecoderSpec(), tmp_path / "source" / "model.onnx")
    own = {"model": {"context_length": 77, "decoder": {"filename": "elsewhere.onnx"}}}
    (tmp_path / "source" / "genai_config.json").write_text(json.dumps(own))
    compile_model(tmp_path / "source", tmp_path / "out", recipe="safe", verify="off")
    content = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert content["model"]["context_length"] == 77
    assert content["model"]["decoder"]["filename"] == "model.onnx"
    listed = [entry.path for entry in read_manifest(tmp_path / "out").artifact.carried]
    assert listed.count("genai_config.json") == 1
    compile_model(tmp_path / "source", tmp_path / "out", recipe="safe", verify="off", force=True)


@pytest.mark.parametrize("text", [json.dumps({"model": {"vision": {"filename": "vision.onnx"}}}), "{", "[]", "3"])
def test_a_source_that_genai_cannot_run_keeps_its_own_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "source").mkdir()
    write(DecoderSpec(), tmp_path / "source" / "model.onnx")
    (tmp_path / "source" / "genai_config.json").write_text(text)
    result = compile_model(tmp_path / "source", tmp_path / "out", recipe="safe", verify="off")
    assert (tmp_path / "out" / "genai_config.json").read_text() == text
    assert any("genai_config.json is not written" in note for note in result.manifest.notes)


def test_a_model_that_is_no_decoder_gets_none_and_no_remark(tmp_path: Path) -> None:
    encoder = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Relu (x) }'
    )
    onnx.save(encoder, tmp_path / "model.onnx")
    assert write_client_files(tmp_path / "model.onnx", tmp_path) == ([], [])


@pytest.mark.parametrize("uniform", [True, False])
def test_after_structural_passes_no_file_says_what_is_no_longer_so(tmp_path: Path, uniform: bool) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(DecoderSpec(heads=8, kv_heads=4, head_dim=8), source / "model.onnx")
    (source / "config.json").write_text('{"num_attention_heads": 8, "num_hidden_layers": 2}')
    (source / "genai_config.json").write_text('{"model": {"type": "decoder", "decoder": {"num_key_value_heads": 4}}}')
    recipe = tmp_path / "recipe.toml"
    options = f"share = 0.4\nuniform = {str(uniform).lower()}\nrefit = false\n"
    recipe.write_text(f'extends = "safe"\ngates = "none"\n[[passes]]\nname = "prune_heads"\n{options}')
    result = compile_model(source, tmp_path / "out", recipe=recipe, verify="off")
    config = json.loads((result.path / "config.json").read_text())
    counts = {entry["heads"][1][1] for p in result.manifest.passes for entry in p.detail.get("layers", [])}
    genai = result.path / "genai_config.json"
    if uniform:
        assert counts == {2}
        assert config == {"num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 8}
        assert json.loads(genai.read_text())["model"]["decoder"]["num_key_value_heads"] == 2
    else:
        assert not genai.exists()
        assert any("genai_config.json is not carried along" in note for note in result.manifest.notes)
