"""What runs after the recipe, and `compile --opset`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxslim_llm import compiler
from onnxslim_llm.compiler.lowering import check_opset, lowering_passes
from onnxslim_llm.errors import UsageError
from onnxslim_llm.targets import get_target

PORTABLE, ORT_CPU = get_target("portable"), get_target("ort-cpu")
#: A norm with its weight, and a SiLU.
TEXT = """<ir_version: 8, opset_import: ["" : 14]>
    agraph (float[n, 8] x) => (float[n, 8] y) {
        q = Pow (x, two)
        m = ReduceMean <axes = [-1]> (q)
        a = Add (m, eps)
        r = Sqrt (a)
        d = Div (x, r)
        w = Mul (d, scale)
        s = Sigmoid (w)
        y = Mul (w, s)
    }"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(TEXT)
    weights = {"two": 2.0, "eps": 1e-6, "scale": np.linspace(0.5, 1.5, 8)}
    for name, value in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    onnx.save(proto, tmp_path / "norm.onnx")
    return tmp_path / "norm.onnx"


def compiled(source: Path, target: str, opset: int | None) -> tuple[int, dict[str, int]]:
    result = compiler.compile(source, source.parent / "out", target=target, recipe="safe", opset=opset, force=True)
    artifact = result.manifest.artifact
    assert not result.manifest.failed_gates
    return artifact.opset[""], dict(artifact.ops)


@pytest.mark.parametrize(("opset", "norm"), [(18, "ReduceMean"), (21, "ReduceMean"), (23, "RMSNormalization")])
def test_portable_has_the_operators_of_the_wanted_opset(source: Path, opset: int, norm: str) -> None:
    version, ops = compiled(source, "portable", opset)
    assert version == opset
    assert ops[norm] == 1


def test_portable_without_a_wanted_opset_raises_it_no_further_than_fusion_needs(source: Path) -> None:
    version, ops = compiled(source, "portable", None)
    assert version == 18
    assert ops["ReduceMean"] == 1


@pytest.mark.parametrize(("opset", "version", "norm"), [(None, 24, "RMSNormalization"), (21, 21, "ReduceMean")])
def test_ort_cpu_takes_the_newest_operators_unless_told_otherwise(
    source: Path, opset: int | None, version: int, norm: str
) -> None:
    found, ops = compiled(source, "ort-cpu", opset)
    assert found == version
    assert ops[norm] == ops["com.microsoft::QuickGelu"] == 1


@pytest.mark.parametrize(
    ("opset", "reason"),
    [
        (13, "the model has opset 14: it cannot be converted down to 13"),
        (17, "the model has opset 18 by now: it cannot be converted down to 17"),
        (99, "target 'portable' takes opsets from 1 to 26, not 99"),
        (0, "target 'portable' takes opsets from 1 to 26, not 0"),
    ],
)
def test_opsets_that_are_refused(source: Path, opset: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        compiled(source, "portable", opset)
    assert caught.value.todo
    assert not (source.parent / "out").exists()


def test_passes_that_choose_an_opset_keep_to_the_wanted_one() -> None:
    steps = {step.name: step.options() for step in lowering_passes(ORT_CPU, "separate", 21)}
    assert next(iter(steps)) == "convert_opset"
    assert steps["convert_opset"] == {"version": 21}
    assert steps["lower_contrib_ops"]["opset"] == steps["lower_attention"]["opset"] == 21
    assert "convert_opset" not in {step.name for step in lowering_passes(ORT_CPU, "separate", None)}


def test_the_checks_before_the_model_is_opened() -> None:
    check_opset(PORTABLE, None)
    check_opset(PORTABLE, 24)
    check_opset(PORTABLE, 24, have=24)
    with pytest.raises(UsageError, match="has opset 25"):
        check_opset(PORTABLE, 24, have=25)
