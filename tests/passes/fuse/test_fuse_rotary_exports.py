"""Every rotary embedding of every family, from every exporter, is fused, and nothing stays around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import pytest
from zoo.access import model_path
from zoo.families import FAMILIES, LAYERS

from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.rewrite.pipeline import Pipeline

PIPELINE = "cleanup, fuse_rms_norm, fuse_layer_norm, fuse_rotary, cleanup"
#: Layers that rotate, and pairs of tables, where it is not all of them and one.
LAYERS_THAT_ROTATE = {"smollm3": 1}
PAIRS_OF_TABLES = {"gemma3": 2}
#: Decoders without rotary embeddings.
OTHERS = frozenset({"gpt2", "opt", "bloom", "mpt", "gpt_neo"})
#: What may stand between a projection and its rotation: a bias, a bound, a norm of each head, a part of packed heads.
BETWEEN = frozenset({"Add", "Clip", "RMSNorm", "LayerNormalization", "Slice", "Split", "Gather", "Expand", "Mul"})
#: Reads the heads apart, so that heads side by side need a Reshape.
_NEEDS_HEADS = frozenset({"RMSNorm", "LayerNormalization", "Slice", "Split", "Gather", "Expand"})


def _exports() -> Iterator[Any]:
    for family in FAMILIES:
        if family.kind == "decoder" and family.name not in OTHERS:
            for exporter in family.exporters:
                # The builder of onnxruntime-genai writes fused operators itself.
                # What is known not to be fused is watched by tests/fusion.
                if exporter not in {**family.refused, **family.gaps} and exporter != "genai":
                    marks = () if (family.name, exporter) == ("llama", "optimum") else (pytest.mark.zoo,)
                    yield pytest.param(family.name, exporter, marks=marks, id=f"{family.name}-{exporter}")


def _between(tensor: gs.Tensor) -> list[str]:
    """Operators from a projection to `tensor`."""
    found: list[str] = []
    while isinstance(tensor, gs.Variable) and tensor.inputs and tensor.inputs[0].op not in ("MatMul", "Gemm"):
        node = tensor.inputs[0]
        found.append(node.op)
        variables = [t for t in node.inputs if isinstance(t, gs.Variable)]
        tensor = variables[0] if variables else gs.Variable.empty()
    return found


def _fuse(path: Path) -> tuple[Model, list[gs.Node]]:
    model = open_model(path)
    records = Pipeline(PIPELINE).run(model)
    assert not next(record for record in records if record.name == "fuse_rotary").skipped
    return model, [node for _, node in calls(model, *ROTARY.values())]


@pytest.mark.parametrize(("name", "exporter"), [*_exports()])
def test_exports(name: str, exporter: str) -> None:
    _, found = _fuse(model_path(name, exporter))
    assert len(found) == 2 * LAYERS_THAT_ROTATE.get(name, LAYERS)
    assert len({tuple(id(t) for t in node.inputs[1:]) for node in found}) == PAIRS_OF_TABLES.get(name, 1)
    for node in found:
        between = _between(node.inputs[0])
        assert set(between) <= BETWEEN | {"Reshape"}
        assert "Reshape" not in between or set(between) & _NEEDS_HEADS


def test_the_sample_model(sample_dir: Path) -> None:
    _, found = _fuse(sample_dir / "model.onnx")
    assert len(found) == 10
    assert [_between(node.inputs[0]) for node in found] == [[]] * 10
