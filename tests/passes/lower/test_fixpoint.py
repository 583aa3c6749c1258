"""Compiling an artifact again changes nothing, whatever the options of the first compile were."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from block_models import fused, tied

from onnxslim_llm.ir.model import Model, from_proto, open_model
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.targets import TARGETS, Target

OPTIONS = [
    "",
    "{embedding_bits=4, lm_head_bits=4}",
    "{symmetric=false, scale_dtype=float16, embedding_bits=4, lm_head_bits=4}",
    "{block=0}",
]


def compiled(model: Model, target: Target, options: str, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    for steps in (f"cleanup, quantize_weights{options}", target.lowering):
        Pipeline(steps).run(model, Context(target=target))
    save_model(model, folder / "model.onnx")
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("target", [t for t in TARGETS if 4 in t.weight_bits], ids=lambda t: t.name)
def test_an_artifact_compiles_to_itself(target: Target, options: str, tmp_path: Path) -> None:
    source = tied(512, 70, opset=18)
    first = compiled(from_proto(source), target, options, tmp_path / "first")
    second = compiled(open_model(tmp_path / "first" / "model.onnx"), target, "", tmp_path / "second")
    assert first == second
    path = tmp_path / "second" / "model.onnx"
    if target.name == "ort-cpu-ops":
        assert sum(node.op_type == "MatMulPacked" for node in onnx.load(path, load_external_data=False).graph.node) == 2
    else:
        assert fused(path, tmp_path)["MatMulNBits"] == 2
