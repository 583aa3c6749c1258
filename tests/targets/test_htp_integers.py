"""Float where HTP has integers only: refused by the lint, and measured to be refused by the vendor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxslim_llm as osl
from onnxslim_llm.compiler.legality import IllegalGraphError
from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.targets.base import VendorError
from onnxslim_llm.targets.htp_integers import FLOAT_OPERATOR, FLOAT_PRODUCT
from onnxslim_llm.targets.qnn_htp import QNN_HTP

there, why = QNN_HTP.installed()
needs_qnn = pytest.mark.skipif(not there, reason=why)

X, Y, IDS = "float[1, 4, 32] x", "float[1, 4, 32] y", "int64[1, 4] x"
Q = "xq = QuantizeLinear (x, one, zero) xf = DequantizeLinear (xq, one, zero) "
R = " rq = QuantizeLinear (r, one, zero) y = DequantizeLinear (rq, one, zero)"
W = "wf = DequantizeLinear <axis = 1> (codes, scales) "
#: Graphs that the vendor's compiler does not take: input, body, the node that is to blame, and the rule that it breaks.
REFUSED = {
    "a weight beside floats": (X, f"{W} y = MatMul (x, wf)", "DequantizeLinear 'wf'", FLOAT_PRODUCT),
    "a float result": (X, f"{Q}{W} y = MatMul (xf, wf)", "DequantizeLinear 'wf'", FLOAT_PRODUCT),
    "a float input": (X, f"{W} r = MatMul (x, wf)" + R, "DequantizeLinear 'wf'", FLOAT_PRODUCT),
    "a look-up": (IDS, "y = Gather (w, x)", "Gather 'y'", FLOAT_OPERATOR),
    "a look-up that is rounded later": (IDS, "r = Gather (w, x)" + R, "Gather 'r'", FLOAT_OPERATOR),
    "Gelu": (X, "y = Gelu (x)", "Gelu 'y'", FLOAT_OPERATOR),
    "Gelu with a float result": (X, f"{Q} y = Gelu (xf)", "Gelu 'y'", FLOAT_OPERATOR),
    "a norm with a float scale": (X, f"{Q} r = RMSNormalization (xf, b)" + R, "RMSNormalization 'r'", FLOAT_OPERATOR),
    "a choice": (X, "c = Cast <to = 9> (x) y = Where (c, x, x)", "Where 'y'", FLOAT_OPERATOR),
}
#: Graphs that it takes.
TAKEN = {
    "float": (X, "p = MatMul (x, w) y = Add (p, b)"),
    "a weight with one scale": (X, "wf = DequantizeLinear (codes, one) y = MatMul (x, wf)"),
    "integers": (X, f"{Q}{W} r = MatMul (xf, wf)" + R),
    "a rounded look-up": (IDS, "wf = DequantizeLinear (table, one, zero) r = Gather (wf, x)" + R),
    "a look-up of integers": (IDS, "i = Gather (numbers, x) y = Cast <to = 1> (i)"),
    "half precision": (X, "h = Cast <to = 10> (x) g = Gelu (h) y = Cast <to = 1> (g)"),
    "a choice with a constant": (X, f"c = Cast <to = 9> (x) {Q} r = Where (c, xf, one)" + R),
}


def graph(given: str, body: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((32, 32)).astype(np.float32),
        "b": np.ones(32, np.float32),
        "codes": rng.integers(-127, 128, (32, 32)).astype(np.int8),
        "scales": np.full(32, 0.01, np.float32),
        "table": rng.integers(0, 256, (32, 32)).astype(np.uint8),
        "one": np.float32(0.03),
        "zero": np.uint8(128),
        "numbers": np.arange(40),
    }
    result = "float[1, 4] y" if "numbers" in body else Y
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> g ({given}) => ({result}) {{ {body} }}')
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used
    )
    return proto


def linted(proto: onnx.ModelProto) -> list[tuple[str, str, str]]:
    model = from_proto(proto)
    infer_shapes(model)
    return [(v.where, v.rule, v.fix) for v in QNN_HTP.lint(model)]


@pytest.mark.parametrize("name", REFUSED)
def test_float_is_refused_where_there_are_only_integers(name: str) -> None:
    given, body, wanted, rule = REFUSED[name]
    ((where, why_not, fix),) = linted(graph(given, body))
    assert (where, why_not) == (wanted, rule)
    assert "--calib" in fix
    assert "w8a16" in fix


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_not_refused(name: str) -> None:
    assert linted(graph(*TAKEN[name])) == []


@pytest.mark.runtimes
@needs_qnn
@pytest.mark.parametrize("name", [*REFUSED, *TAKEN])
def test_the_vendor_says_the_same(name: str, tmp_path: Path) -> None:
    """A newer compiler that takes more makes a rule superfluous; one that takes less makes one wrong."""
    path = tmp_path / "model.onnx"
    onnx.save(graph(*(REFUSED[name][:2] if name in REFUSED else TAKEN[name])), path)
    if name in REFUSED:
        with pytest.raises(VendorError):
            QNN_HTP.finish(path)
    else:
        assert "of" in QNN_HTP.finish(path).notes[0]


@needs_qnn
@pytest.mark.parametrize("recipe", ["int8", "int4-fast"])
def test_weights_alone_do_not_run_on_it(sample_dir: Path, tmp_path: Path, recipe: str) -> None:
    with pytest.raises(IllegalGraphError) as caught:
        osl.compile(sample_dir, tmp_path / "out", target="qnn-htp", recipe=recipe, shape="batch=1,seq=8,past=0")
    assert caught.value.exit_code == 4
    assert caught.value.where.startswith("DequantizeLinear")
    assert FLOAT_PRODUCT in caught.value.what
    assert "w4a16" in caught.value.todo
    assert not list(tmp_path.iterdir())


@needs_qnn
def test_the_float_model_does_not_run_on_it(sample_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(IllegalGraphError, match="in float32") as caught:
        osl.compile(sample_dir, tmp_path / "out", target="qnn-htp", recipe="safe", shape="batch=1,seq=8,past=0")
    assert "recipe w8a16" in caught.value.todo
    assert not list(tmp_path.iterdir())


@pytest.mark.runtimes
@needs_qnn
def test_without_a_recipe_the_target_chooses_one_that_runs(tmp_path: Path) -> None:
    onnx.save(graph(X, "y = MatMul (x, w)"), tmp_path / "model.onnx")
    result = osl.compile(tmp_path / "model.onnx", tmp_path / "out", target="qnn-htp")
    notes = " ".join(result.manifest.notes)
    assert "recipe 'w8a16': the default of target 'qnn-htp'" in notes
    assert "no calibration data: ranges of activations come from random inputs" in notes
    assert result.manifest.artifact.ops["QuantizeLinear"] == 2
