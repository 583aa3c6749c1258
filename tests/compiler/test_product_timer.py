"""Times of products: real measurements in real runtimes, on forms so small that they take no time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxslim_llm as osl
from onnxslim_llm.compiler.product_models import INPUT, ROW, lowered_products
from onnxslim_llm.compiler.product_timer import RuntimeTimer
from onnxslim_llm.custom_ops import available
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.targets import get_target
from onnxslim_llm.targets.product_times import ProductForm, ReadAs

ELEMENTS = 64 * 64
WIDTH = 64
TARGETS = ["portable", "ort-cpu", *(["ort-cpu-ops"] if available() else [])]


def _form(bits: int = 4, *, symmetric: bool = True, read_as: ReadAs = "product", columns: int = 96) -> ProductForm:
    return ProductForm(WIDTH, columns, bits, 32 if bits != 6 else 64, symmetric, "float16", "float32", read_as)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("read_as", ["product", "look_up", "tied"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_products_run_in_the_target(tmp_path: Path, target: str, read_as: ReadAs, bits: int) -> None:
    model = lowered_products(_form(bits, read_as=read_as, symmetric=bits == 6), 3, get_target(target))
    save_model(model, tmp_path / "model.onnx")
    assert not get_target(target).lint(model)
    session = get_target(target).open(tmp_path / "model.onnx", threads=1)
    rows = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    given = {INPUT: rows, ROW: np.ones(1, np.int64)}
    results = list(session.run({info.name: given[info.name] for info in session.inputs}).values())
    per_weight = 2 if read_as == "tied" else 1
    assert len(results) == 3 * per_weight
    assert all(np.isfinite(r).all() and r.any() for r in results)
    assert not np.allclose(results[0], results[per_weight])  # each has a weight of its own


@pytest.mark.parametrize("target", TARGETS)
def test_times_grow_with_the_work_and_are_measured_once(target: str) -> None:
    timer = RuntimeTimer(get_target(target), threads=1)
    # A hundred times the work, so that no noise hides it.
    forms = [_form(4), _form(4, columns=9600), _form(8, read_as="look_up")]
    table = timer.measure(forms, ELEMENTS)
    assert table.seconds[forms[1]] > 3 * table.seconds[forms[0]] > 0
    assert table.seconds[forms[2]] > 0
    assert table.spread >= 1
    assert table.runtime.startswith("onnxruntime ")
    assert timer.measure(forms[:2], ELEMENTS).seconds == {form: table.seconds[form] for form in forms[:2]}


def test_simulated_devices_are_not_timed() -> None:
    with pytest.raises(UsageError, match="only simulated here"):
        RuntimeTimer(get_target("qnn-htp")).measure([_form()], ELEMENTS)


def _small_model(path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array((rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32), n) for n in "AB"]
    nodes = [helper.make_node("MatMul", ["x", "A"], ["a"]), helper.make_node("MatMul", ["a", "B"], ["y"])]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", WIDTH]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_a_compile_measures_and_its_manifest_repeats_the_choice(tmp_path: Path) -> None:
    source = _small_model(tmp_path / "model.onnx")
    settings = ["quantize_weights.target_ms=50", "quantize_weights.widths=[4,8]", "quantize_weights.symmetric=true"]
    options = {"target": "ort-cpu", "recipe": "int4-fast", "jobs": 1}
    first = osl.compile(source, tmp_path / "one", settings=settings, **options)
    detail = next(p.detail for p in first.manifest.passes if p.name == "quantize_weights")
    assert 0 < detail["expected_ms"] <= 50
    assert {entry["bits"] for entry in detail["tensors"]} == {8}
    table = json.loads((first.path / "manifest.json").read_text())
    stored = next(p["detail"]["product_times"] for p in table["passes"] if "product_times" in p["detail"])
    assert (stored["target"], stored["threads"]) == ("ort-cpu", 1)
    times = f"quantize_weights.times={first.path / 'manifest.json'}"
    again = osl.compile(source, tmp_path / "two", settings=[*settings, times], **options)
    assert (again.path / "model.onnx").read_bytes() == (first.path / "model.onnx").read_bytes()


def test_a_limit_below_every_form_ends_the_compile(tmp_path: Path) -> None:
    source = _small_model(tmp_path / "model.onnx")
    settings = ["quantize_weights.target_ms=1e-7", "quantize_weights.widths=[4]"]
    with pytest.raises(UsageError, match="the fastest forms take"):
        osl.compile(source, tmp_path / "out", target="ort-cpu", recipe="int4-fast", settings=settings, jobs=1)
    assert not (tmp_path / "out").exists()


def test_a_compile_for_a_simulated_device_is_refused(tmp_path: Path) -> None:
    source = _small_model(tmp_path / "model.onnx")
    if not get_target("qnn-htp").installed()[0]:
        pytest.skip("the vendor's tools are not installed")
    with pytest.raises(UsageError, match="qnn-htp"):
        osl.compile(
            source,
            tmp_path / "out",
            target="qnn-htp",
            recipe="int4-fast",
            settings=["quantize_weights.target_ms=1"],
            shape="T=4",
            jobs=1,
        )
