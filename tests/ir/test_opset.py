"""Conversion to newer opsets: same results, nothing lost, and a refusal that names the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cleanup.torchscript_decoder import Sizes, build
from cleanup.torchscript_decoder import feeds as decoder_feeds
from onnx import numpy_helper, parser, version_converter

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.ir.model import Model, from_proto, open_model
from onnxslim_llm.ir.opset import convert_opset

#: The converter rewrites layouts and attributes, not sums: float32 results are equal up to a reordered reduction.
RTOL, ATOL = 1e-5, 1e-6
NEW = 21


def model(text: str, opset: int, **initializers: Any) -> Model:
    text = text.strip()
    header = "" if text.startswith("<") else f'<ir_version: 7, opset_import: ["" : {opset}]>\n'
    proto = parser.parse_model(header + text)
    for name, value in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return from_proto(proto)


def run(proto: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    results: list[Any] = session.run(None, feeds)
    return results


def converted(of: Model, feeds: dict[str, Any], version: int = NEW) -> tuple[onnx.ModelProto, list[str]]:
    before = of.to_proto()
    changed = convert_opset(of, version)
    after = of.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert {item.domain: item.version for item in after.opset_import}[""] == version
    for expected, actual in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)
    return after, changed


X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("opset", "body"),
    [
        (11, "y = ReduceSum <axes = [1], keepdims = 1> (x)"),
        (13, "y = ReduceMean <axes = [-1]> (x)"),
        (17, "y = ReduceMean <axes = [-1], keepdims = 0> (x)"),
        (17, "y = ReduceMax <axes = [0]> (x)"),
        (11, "u = Unsqueeze <axes = [0]> (x)  y = Squeeze <axes = [0]> (u)"),
        (11, "y = Softmax <axis = 0> (x)"),
        (11, "y = Softmax <axis = 1> (x)"),
        (9, "y = Slice <starts = [1], ends = [3], axes = [1]> (x)"),
        (11, "a, y = Split <axis = 1, split = [1, 3]> (x)"),
        (13, "a, y = Split <axis = 1> (x)"),
        (6, "y = Clip <min = 0.0, max = 0.5> (x)"),
        (11, "y = Dropout <ratio = 0.5> (x)"),
        (9, "c = Constant <value = float {2.0}> ()  y = Mul (x, c)"),
        (13, "y = Cast <to = 10> (x)"),
        (13, "s = Shape (x)  y = Reshape (x, s)"),
    ],
)
def test_operators_that_changed(opset: int, body: str) -> None:
    kind = "float16" if "to = 10" in body else "float"
    rank = "N" if "keepdims = 0" in body else "N, M"
    converted(model(f"g (float[3, 4] x) => ({kind}[{rank}] y) {{ {body} }}", opset), {"x": X})


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_a_decoder(opset: int) -> None:
    sizes = Sizes()
    source = build(sizes)  # opset 17
    if opset < 17:
        source.opset_import[0].version = opset  # all its operators mean the same there
    elif opset > 17:
        source = from_proto(version_converter.convert_version(source, opset)).to_proto()
    onnx.checker.check_model(source, full_check=True)
    feeds = decoder_feeds(sizes, 2, 3, 4)
    after, changed = converted(from_proto(source), feeds)
    means = [n for n in after.graph.node if n.op_type == "ReduceMean"]
    assert len(means) == 2 * sizes.layers + 1
    assert all(len(n.input) == 2 for n in means)
    assert len(changed) == (len(means) if opset < 18 else 0)


def test_nothing_is_touched_that_did_not_change() -> None:
    graph = model(
        "g (float[3, 4] x) => (float[3, 1] y) { a = Exp (x)  b = ReduceMean <axes = [1]> (a)  y = Neg (b) }", 17
    )
    proto = graph.to_proto()
    for node in proto.graph.node:
        node.name = f"node_{node.op_type}"
        node.doc_string = node.op_type
        node.metadata_props.add(key="k", value=node.op_type)
    proto.metadata_props.add(key="model", value="m")
    after, changed = converted(from_proto(proto), {"x": X})
    assert changed == ["node_ReduceMean"]
    kept = {n.op_type: n for n in after.graph.node}
    for op in ("Exp", "ReduceMean", "Neg"):
        assert (kept[op].name, kept[op].doc_string, kept[op].metadata_props[0].value) == (f"node_{op}", op, op)
    assert after.metadata_props[0].value == "m"


def test_weights_are_not_looked_at() -> None:
    big = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    graph = model(
        "g (float[N, 256] x) => (float[N, 1] y) { m = MatMul (x, w)  y = ReduceMean <axes = [1]> (m) }", 13, w=big
    )
    weight = next(t for t in graph.constants() if t.name == "w")._values
    convert_opset(graph, NEW)
    assert next(t for t in graph.constants() if t.name == "w")._values is weight


def test_bodies_of_control_flow() -> None:
    text = """
        g (bool c, float[3, 4] x) => (float[N, M] y) {
            y = If (c) <
                then_branch = t () => (float[N, M] p) { p = ReduceMean <axes = [1]> (x) },
                else_branch = e () => (float[N, M] q) { q = ReduceMax <axes = [0]> (x) }>
        }"""
    for flag in (True, False):
        after, changed = converted(model(text, 13), {"x": X, "c": np.array(flag)})
        assert changed == ["p", "q"]
        assert len(after.graph.node) == 1


FUNCTION = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[3, 4] x) => (float[N, M] y) {{ y = local.F <{call}> (x) }}
    <domain: "local", opset_import: ["" : 17]>
    F <{formal}> (p) => (q) {{ {body} }}"""


def test_bodies_of_functions() -> None:
    text = FUNCTION.format(
        call="axis = 0", formal="axis", body="s = Softmax <axis: int = @axis> (p)  q = ReduceMean <axes = [1]> (s)"
    )
    after, changed = converted(model(text, 17), {"x": X})
    assert changed == ["q"]
    assert after.functions[0].opset_import[0].version == NEW
    assert [len(n.input) for n in after.functions[0].node if n.op_type == "ReduceMean"] == [2]


def test_an_attribute_of_a_function_that_became_an_input_is_refused() -> None:
    text = FUNCTION.format(call="axes = [1]", formal="axes", body="q = ReduceMean <axes: ints = @axes> (p)")
    with pytest.raises(ModelError, match="where a function sets its attributes") as caught:
        convert_opset(model(text, 17), NEW)
    assert "inline_functions" in caught.value.todo


def test_custom_domains_are_left() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[3, 4] x) => (float[3, 4] y) { a = com.microsoft.Gelu (x)  y = Relu (a) }"""
    after, changed = converted(model(text, 17), {"x": X})
    assert not changed
    assert {item.domain: item.version for item in after.opset_import} == {"": NEW, "com.microsoft": 1}


@pytest.mark.parametrize(
    ("opset", "text"),
    [
        (
            18,
            "g (float[1, 4, 2] x, float[2] a) => (float[1, 4, 2] y) {"
            " y = GroupNormalization <num_groups = 2> (x, a, a) }",
        ),
        (
            8,
            "g (float[1, 4] v, float[1, 3, 4] x) => (float[1, 4] y, float[1, 3, 4] z) {"
            " y, z = Scan <num_scan_inputs = 1, body = b (float[4] s, float[4] a) => (float[4] t, float[4] p)"
            " { t = Add (s, a)  p = Neg (s) }> (, v, x) }",
        ),
        (9, "g (float[1, 1, 2, 2] x, float[4] a) => (float[B, C, H, W] y) { y = Upsample (x, a) }"),
        (10, "g (float[1, 1, 2, 2] x, float[4] a) => (float[B, C, H, W] y) { y = Resize (x, a) }"),
    ],
)
def test_what_the_converter_gets_wrong_is_refused(opset: int, text: str) -> None:
    with pytest.raises(ModelError, match="cannot be converted") as caught:
        convert_opset(model(text, opset), NEW)
    assert "node 'y'" in caught.value.where


def test_what_the_converter_cannot_do_is_an_error_with_the_node() -> None:
    graph = model("g (float[N, 4] x, float[4] z) => (float[N, 4] y) { y = Add <axis = 1, broadcast = 1> (x, z) }", 6)
    with pytest.raises(ModelError, match="Add cannot be converted from opset 6 to 21") as caught:
        convert_opset(graph, NEW)
    assert caught.value.where == "node 'y'"


def test_wrong_versions() -> None:
    graph = model("g (float[3] x) => (float[3] y) { y = Neg (x) }", 18)
    with pytest.raises(UsageError, match="cannot be converted down"):
        convert_opset(graph, 17)
    with pytest.raises(UsageError, match="unknown"):
        convert_opset(graph, 10_000)
    assert convert_opset(graph, 18) == []


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("opset", [13, 17, 20])
def test_a_decoder_that_torch_exported(opset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))  # models/ is no part of the package
    from models import export
    from models.llama import Llama, LlamaConfig

    monkeypatch.setattr(export, "OPSET", opset)
    torch.manual_seed(0)
    s = Sizes(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocab=128)
    decoder = Llama(LlamaConfig(s.vocab, s.hidden, s.ffn, s.layers, s.heads, s.kv_heads, s.head)).eval()
    export.export(decoder, tmp_path / "model.onnx", "torchscript")
    _, changed = converted(open_model(tmp_path / "model.onnx"), decoder_feeds(s, 2, 3, 4))
    assert len(changed) == (5 if opset < 18 else 0)  # the ReduceMean of each norm
