"""Sites are counted without the rules that fuse them, and those that are left have a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from reference_decoder import DecoderSpec, write

from onnxslim_llm.compiler import compile as compile_model
from onnxslim_llm.compiler import inspect
from onnxslim_llm.compiler.anchors import Kind, find_anchors
from onnxslim_llm.ir.model import from_proto, open_model
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.pipeline import Pipeline


def kinds(text: str, opset: int = 18, **weights: np.ndarray) -> list[Kind]:
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return [anchor.kind for anchor in find_anchors(from_proto(proto))]


def counts(path: Path) -> dict[str, tuple[int, int]]:
    return {report.kind: (report.sites, report.fused) for report in inspect(path, recipe="safe").fusion}


def test_a_softmax_that_weights_values_is_an_attention() -> None:
    assert kinds("g (float[S, T] x, float[T, D] v) => (float[S, D] y) { w = Softmax (x)\n y = MatMul (w, v) }") == [
        "attention"
    ]


def test_a_softmax_of_a_classifier_or_a_router_is_none() -> None:
    assert kinds("g (float[S, V] x) => (float[S, V] y) { y = Softmax (x) }") == []
    text = "g (float[S, E] x) => (float[S, 4] y) { w = Softmax (x)\n y = MatMul (w, W) }"
    assert kinds(text, W=np.ones((3, 4), np.float32)) == []


@pytest.mark.parametrize("square", ["Mul (x, x)", "Pow (x, two)"])
def test_a_mean_of_squares_is_a_norm(square: str) -> None:
    text = f"g (float[S, 4] x) => (float[S, 1] y) {{ s = {square}\n c = Cast <to = 1> (s)\n y = ReduceMean (c, last) }}"
    assert kinds(text, two=np.array(2, np.float32), last=np.array([-1])) == ["norm"]


def test_other_means_are_none() -> None:
    text = "g (float[S, 4] x, float[S, 4] z) => (float[S, 1] y) { s = Mul (x, z)\n y = ReduceMean (s, last) }"
    assert kinds(text, last=np.array([-1])) == []
    text = "g (float[S, 4] x) => (float[S, 1] y) { s = Pow (x, three)\n y = ReduceMean (s, last) }"
    assert kinds(text, three=np.array(3, np.float32), last=np.array([-1])) == []


def test_a_negated_half_beside_the_other_is_a_rotation() -> None:
    text = """g (float[S, 4] x, float[S, 2] z) => (float[S, 4] y) {
        a, b = Split <axis = -1, num_outputs = 2> (x)
        n = Neg (b)
        y = Concat <axis = -1> (n, OTHER)
    }"""
    assert kinds(text.replace("OTHER", "a")) == ["rotary"]
    assert kinds(text.replace("OTHER", "z")) == []


def test_single_operators_count() -> None:
    text = """g (float[B, S, 4] x, float[4] w) => (float[B, S, 4] y) {
        n = LayerNormalization (x, w)
        m = com.microsoft.SimplifiedLayerNormalization (n, w)
        y = com.microsoft.MultiHeadAttention <num_heads = 2> (m, m, m)
    }"""
    assert kinds(text) == ["norm", "norm", "attention"]


@pytest.mark.parametrize("cache", [True, False])
def test_a_decoder_of_three_layers(tmp_path: Path, cache: bool) -> None:
    path = write(DecoderSpec(layers=3, cache=cache), tmp_path / "m.onnx")
    assert counts(path) == {"attention": (3, 3), "norm": (7, 7), "rotary": (6, 6)}


def test_an_artifact_is_fused_already(tmp_path: Path) -> None:
    path = write(DecoderSpec(), tmp_path / "m.onnx")
    result = compile_model(path, tmp_path / "out", recipe="safe", target="ort-cpu", verify="off")
    assert counts(result.path) == {"attention": (2, 2), "norm": (5, 5), "rotary": (4, 4)}


def spoiled(path: Path) -> Path:
    """Add a second output to the first attention's weights, which then must stay, and cube a norm's input."""
    proto = onnx.load(path)
    softmax = next(node for node in proto.graph.node if node.op_type == "Softmax")
    softmax.name = "observed"
    proto.graph.output.append(helper.make_tensor_value_info(softmax.output[0], TensorProto.FLOAT, [None] * 4))
    onnx.save(proto, path)
    return path


def test_what_is_left_has_a_reason(tmp_path: Path) -> None:
    path = spoiled(write(DecoderSpec(), tmp_path / "m.onnx"))
    report = next(report for report in inspect(path, recipe="safe").fusion if report.kind == "attention")
    assert (report.sites, report.fused) == (2, 1)
    ((where, reason),) = report.left
    assert where == "observed"
    assert reason.startswith("fuse_attention: ")
    assert "no rule came near" not in reason


def test_the_manifest_and_the_pages_tell_it(tmp_path: Path) -> None:
    path = spoiled(write(DecoderSpec(), tmp_path / "m.onnx"))
    result = compile_model(path, tmp_path / "out", recipe="safe", verify="off")
    entries = {entry.kind: entry for entry in result.manifest.fusion}
    assert (entries["attention"].sites, entries["attention"].fused) == (2, 1)
    assert entries["attention"].left[0].where == "observed"
    assert (entries["norm"].sites, entries["norm"].fused) == (5, 5)
    page = (result.path / "report.html").read_text()
    assert "attention 1/2, norms 5/5, rotary 4/4" in page
    assert "observed" in page


def test_a_recipe_that_fuses_nothing_has_no_census(tmp_path: Path) -> None:
    path = write(DecoderSpec(), tmp_path / "m.onnx")
    (tmp_path / "plain.toml").write_text('[[passes]]\nname = "cleanup"\n')
    assert inspect(path, recipe=tmp_path / "plain.toml").fusion == ()


def test_layers_of_the_cache_are_attentions_that_must_be_there(tmp_path: Path) -> None:
    """An attention without a Softmax is found by its cache only."""
    proto = onnx.load(write(DecoderSpec(), tmp_path / "m.onnx"))
    for node in proto.graph.node:
        if node.op_type == "Softmax":
            node.op_type = "Sigmoid"
            del node.attribute[:]
            break
    onnx.save(proto, tmp_path / "m.onnx")
    report = next(r for r in inspect(tmp_path / "m.onnx", recipe="safe").fusion if r.kind == "attention")
    assert (report.sites, report.fused) == (2, 1)
    assert "the KV cache has 2 layers" in report.left[0][1]


def test_a_site_that_was_fused_is_gone(tmp_path: Path) -> None:
    """The anchors are found again in what is left, never taken from the passes' own accounts."""
    model = open_model(write(DecoderSpec(), tmp_path / "m.onnx"))
    before = [anchor for anchor in find_anchors(model) if not anchor.whole]
    Pipeline(Recipe.load("safe").build()).run(model)
    after = find_anchors(model)
    assert len(before) == len(after) == 11
    assert all(anchor.whole for anchor in after)
