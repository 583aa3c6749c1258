from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.targets import TARGETS, Target, all_targets, get_target

PORTABLE, ORT_CPU = get_target("portable"), get_target("ort-cpu")


def model(nodes: str, imports: str = "", opset: int = 21, functions: str = "") -> Model:
    head = f'<ir_version: 10, opset_import: ["" : {opset}{imports}]>'
    return from_proto(onnx.parser.parse_model(f"{head} g (float[2] x) => (float[2] y) {{ {nodes} }} {functions}"))


def violations(target: Target, checked: Model) -> list[tuple[str, str]]:
    return [(v.where, v.rule) for v in target.lint(checked)]


def test_the_default_comes_first() -> None:
    names = ["portable", "ort-cpu", "ort-cpu-ops", "qnn-htp"]
    assert [target.name for target in TARGETS] == names
    assert list(all_targets())[: len(names)] == names


def test_a_mistyped_name_gets_a_hint() -> None:
    with pytest.raises(UsageError) as caught:
        get_target("ort_cpu")
    assert "did you mean 'ort-cpu'" in caught.value.todo


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_lowerings_are_pipelines(target: Target) -> None:
    assert "lower" in {step.group for step in Pipeline(target.lowering).passes}


@pytest.mark.parametrize("target", [t for t in TARGETS if not t.extra], ids=lambda t: t.name)
def test_artifacts_are_opened_in_the_real_runtime(target: Target, tmp_path: Path) -> None:
    there, what = target.installed()
    assert there
    assert what.startswith("onnxruntime ")
    path = tmp_path / "model.onnx"
    onnx.save(model("y = Relu (x)").to_proto(), path)
    result = target.open(path, threads=1).run({"x": np.array([-1.0, 2.0], np.float32)})
    np.testing.assert_array_equal(result["y"], [0.0, 2.0])


def test_a_model_that_the_runtime_refuses(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model("y = other.Thing (x)", ', "other" : 1').to_proto(), path)
    with pytest.raises(ModelError, match="Thing"):
        PORTABLE.open(path)


def test_a_runtime_that_is_missing() -> None:
    missing = Target("nowhere", "", "no-such-package-1", "", ())
    assert missing.installed() == (False, "no-such-package-1 is not installed")
    with pytest.raises(ResourceError) as caught:
        missing.open("model.onnx")
    assert caught.value.todo == "pip install no-such-package-1"


def test_clean_models_pass() -> None:
    assert violations(PORTABLE, model("y = Relu (x)")) == []
    assert violations(ORT_CPU, model("y = com.microsoft.Gelu (x)", ', "com.microsoft" : 1')) == []


def test_foreign_domains() -> None:
    found = violations(PORTABLE, model("y = com.microsoft.Gelu (x)", ', "com.microsoft" : 1'))
    assert found == [("Gelu 'y'", "domain 'com.microsoft' is not among ai.onnx")]


def test_functions_of_the_model_are_fine() -> None:
    function = '<domain: "local", opset_import: ["" : 21]> Twice (a) => (b) { b = Add (a, a) }'
    assert violations(PORTABLE, model("y = local.Twice (x)", ', "local" : 1', functions=function)) == []


def test_functions_are_linted_inside() -> None:
    function = '<domain: "local", opset_import: ["" : 21, "odd" : 1]> Twice (a) => (b) { b = odd.Thing (a) }'
    found = violations(PORTABLE, model("y = local.Twice (x)", ', "local" : 1, "odd" : 1', functions=function))
    assert found == [("Thing 'b'", "domain 'odd' is not among ai.onnx")]


def test_concepts_must_be_gone() -> None:
    function = '<domain: "onnxslim_llm", opset_import: ["" : 21]> Twice (a) => (b) { b = Add (a, a) }'
    found = violations(PORTABLE, model("y = onnxslim_llm.Twice (x)", ', "onnxslim_llm" : 1', functions=function))
    assert ("Twice 'y'", "it is a concept of the compiler") in found


def test_imports_must_be_needed_and_there() -> None:
    unused = model("y = Relu (x)", ', "com.microsoft" : 1')
    assert violations(PORTABLE, unused) == [("domain 'com.microsoft'", "it is imported but not used")]
    missing = model("y = com.microsoft.Gelu (x)", ', "com.microsoft" : 1')
    missing.graph.import_domains[:] = [i for i in missing.graph.import_domains if i.domain == ""]
    assert violations(ORT_CPU, missing) == [("domain 'com.microsoft'", "it is used but not imported")]


def test_operators_must_be_known() -> None:
    checked = model("y = Relu (x)")
    checked.graph.nodes[0].op = "Reluu"
    assert violations(PORTABLE, checked) == [("Reluu 'y'", "ai.onnx 21 has no operator Reluu")]


def test_opsets_must_be_known() -> None:
    checked = model("y = Relu (x)")
    checked.set_opset("", PORTABLE.max_opset + 1)
    assert violations(PORTABLE, checked)[0][0] == "opset"
