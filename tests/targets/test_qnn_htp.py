"""The real compiler and simulator where they are installed; what is said about them everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest

import onnxslim_llm as osl
from onnxslim_llm.compiler.legality import IllegalGraphError, check_legal
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.targets import get_target
from onnxslim_llm.targets.base import VendorError
from onnxslim_llm.targets.htp_lint import INT4, INT4_BLOCKS
from onnxslim_llm.targets.qnn_htp import CONTEXT_NAME, PLACEMENT_NAME, QNN_HTP, refused_nodes
from onnxslim_llm.targets.qnn_provider import PACKAGE

SHAPE = "batch=1,seq=8,past=0,total=8"
#: Of a decoder's outputs to those in float32: published for 16-bit activations; 0.99993 was measured on the sample.
COSINE_16 = 0.999
#: Sums of products with block scales are kept in half precision: 4e-4 of the result was measured; a wrong sign gives 1.
HTP_SUM = 2e-3
there, why = QNN_HTP.installed()
needs_qnn = pytest.mark.skipif(not there, reason=why)


@pytest.fixture(scope="module")
def small_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reference_decoder import DecoderSpec, write

    folder = tmp_path_factory.mktemp("decoder")
    return write(DecoderSpec(layers=1, hidden=32, heads=2, kv_heads=1, ffn=64, vocab=64), folder / "model.onnx")


def linted(text: str) -> list[tuple[str, str, str]]:
    model = from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}'))
    infer_shapes(model)
    return [(v.where, v.rule, v.fix) for v in QNN_HTP.lint(model)]


def test_an_operator_that_it_lacks_has_a_nearest_form() -> None:
    ((where, rule, fix),) = linted("g (float[2] x) => (float[2] y) { y = Erf (x) }")
    assert where == "Erf 'y'"
    assert rule == "HTP has no Erf"
    assert "Gelu" in fix


def test_sizes_must_be_fixed() -> None:
    ((where, rule, fix),) = linted("g (float[n] x) => (float[n] y) { y = Relu (x) }")
    assert where == "input 'x', axis 0"
    assert rule == "the size 'n' is not fixed"
    assert fix.startswith("--shape n=")


def test_masks_must_be_moderate() -> None:
    found = linted("g (float[2] x) => (float[2] y) <float[2] mask = {0, -3.4e38}> { y = Add (x, mask) }")
    assert [where for where, _, _ in found] == ["Add 'y'"]
    assert "legalize_masks" in found[0][2]


def blocked_product() -> onnx.ModelProto:
    """y = x W with W of int4 codes and scales in two blocks, everything between Q and DQ nodes of 16 bits."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[1, 4, 32] x) => (float[1, 4, 8] y)
    <float step = {0.0001}, float wide = {0.004}, uint16 middle = {32768}> {
        xq = QuantizeLinear (x, step, middle)
        xd = DequantizeLinear (xq, step, middle)
        w = DequantizeLinear <axis = 0, block_size = 16> (codes, scale)
        f = MatMul (xd, w)
        yq = QuantizeLinear (f, wide, middle)
        y = DequantizeLinear (yq, wide, middle)
    }"""
    proto = onnx.parser.parse_model(text)
    codes = np.random.default_rng(0).integers(-8, 8, (32, 8))
    scales = np.linspace(0.5, 2.0, 16, dtype=np.float32).reshape(2, 8)
    proto.graph.initializer.append(onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, [32, 8], codes.flatten()))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(scales, "scale"))
    return proto


def test_symmetric_blocks_of_int4_are_fine() -> None:
    proto = blocked_product()
    assert QNN_HTP.lint(from_proto(proto)) == []
    proto.graph.initializer.append(onnx.helper.make_tensor("zeros", onnx.TensorProto.INT4, [2, 8], [1] * 16))
    proto.graph.node[2].input.append("zeros")
    assert [v.rule for v in QNN_HTP.lint(from_proto(proto))] == [INT4_BLOCKS]


@pytest.mark.runtimes
@needs_qnn
def test_blocks_of_int4_are_multiplied_right(tmp_path: Path) -> None:
    proto = blocked_product()
    onnx.save(proto, tmp_path / "model.onnx")
    x = np.random.default_rng(1).uniform(-3, 3, (1, 4, 32)).astype(np.float32)
    (wanted,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
    got = QNN_HTP.open(tmp_path / "model.onnx").run({"x": x})["y"]
    np.testing.assert_allclose(got, wanted, atol=HTP_SUM * float(np.abs(wanted).max()))


def test_weights_of_4_bits_with_a_scale_per_channel_are_refused(tmp_path: Path) -> None:
    """What the simulator makes of them cannot be verified, see htp_lint.INT4."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[1, 2] x) => (float[1, 2] y)
    <float[2] scale = {0.5, 0.5}> {
        w = DequantizeLinear <axis = 1> (codes, scale)
        y = MatMul (x, w)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, [2, 2], [1, -2, 3, -4]))
    onnx.save(proto, tmp_path / "model.onnx")
    assert [v.where for v in QNN_HTP.lint(from_proto(proto)) if v.rule == INT4] == ["DequantizeLinear 'w'"]
    with pytest.raises(IllegalGraphError, match="nothing was published") as caught:
        check_legal(from_proto(proto), QNN_HTP, tmp_path / "model.onnx")
    assert caught.value.exit_code == 4
    assert caught.value.where == "DequantizeLinear 'w'"
    assert "w4a16" in caught.value.todo


def test_options() -> None:
    other = QNN_HTP.with_options({"htp_arch": "73", "seconds": "60"})
    assert other.provider_options["htp_arch"] == "73"  # type: ignore[attr-defined]
    assert other.seconds == 60  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="no option 'arch'"):
        QNN_HTP.with_options({"arch": "73"})
    with pytest.raises(UsageError, match="no number of seconds"):
        QNN_HTP.with_options({"seconds": "soon"})
    with pytest.raises(UsageError, match="knows no htp_arch '999'") as caught:
        QNN_HTP.with_options({"htp_arch": "999"})
    assert "81" in caught.value.todo
    with pytest.raises(UsageError, match="'chip' is no chip"):
        QNN_HTP.with_options({"soc_model": "chip"})
    with pytest.raises(UsageError, match="no option 'htp_arch'"):
        get_target("portable").with_options({"htp_arch": "73"})


@pytest.mark.runtimes
@needs_qnn
@pytest.mark.parametrize("recipe", ["w8a16", "w8a8"])
def test_norms_of_encoders_run_on_the_processor(tmp_path: Path, recipe: str) -> None:
    """A bias of a norm in int32 would keep the norm from it."""
    rng = np.random.default_rng(0)
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[b, s, 32] x) => (float[b, s, 32] y) {
        a = MatMul (x, w)
        r = Add (x, a)
        y = LayerNormalization <axis = -1> (r, gamma, beta)
    }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in (("w", (32, 32)), ("gamma", (32,)), ("beta", (32,))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "model.onnx")
    calibration = tmp_path / "calibration"
    calibration.mkdir()
    for i in range(8):
        np.savez(calibration / f"{i}.npz", x=rng.standard_normal((1, 4, 32)).astype(np.float32))
    out = tmp_path / "out"
    osl.compile(
        tmp_path / "model.onnx", out, target="qnn-htp", recipe=recipe, calib=calibration, shape="b=1,s=4", verify="fast"
    )
    assert set(json.loads((out / PLACEMENT_NAME).read_text())["nodes"]) == {"NPU"}


def without(package: str, folder: Path) -> dict[str, str]:
    """Return variables for `python -S`: an environment like this one, but for what the package has installed."""
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if not entry.name.startswith(package.replace("-", "_")) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    paths = [folder]
    if not (folder / "onnxslim_llm").exists():  # it runs from the checkout
        paths.append(Path(osl.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def test_the_vendor_package_is_missing(small_decoder: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    out = tmp_path / "out"
    command = [sys.executable, "-S", "-m", "onnxslim_llm", "compile", small_decoder, "-o", out, "--target", "qnn-htp"]
    done = subprocess.run(
        [*map(str, command), "--shape", SHAPE], env=without(PACKAGE, site), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 5, done.stderr
    assert "onnxruntime-qnn is not installed" in done.stderr
    assert 'pip install "onnxslim-llm[qnn]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_the_size_that_is_missing_is_named(small_decoder: Path, tmp_path: Path) -> None:
    if not there:
        pytest.skip(why)
    with pytest.raises(UsageError) as caught:
        osl.compile(small_decoder, tmp_path / "out", target="qnn-htp", shape="batch=1,seq=8,total=8")
    assert "needs fixed sizes, and 'past" in caught.value.what
    assert caught.value.todo.startswith("--shape past")
    assert not (tmp_path / "out").exists()


def test_reasons_are_read_from_the_log() -> None:
    log = (
        "Validation FAILED for 3 nodes in OrtNodeUnit (Erf) :\n\tREASON : Operators of type `Erf` are not supported\n"
        "QNN.backendValidateOpConfig() failed for node `n2` of type `RmsNorm` with error code 3110\n"
        "Unsupported nodes in QNN EP: { name: n1, type: Erf }{ name: n2, type: RMSNormalization }"
        "{ name: , type: Det }{ name: , type: Trilu }\n"
    )
    assert refused_nodes(log, {"Det": "y"}) == [
        "Erf 'n1' (Operators of type `Erf` are not supported)",
        "RMSNormalization 'n2' (its types or shapes are not supported, error 3110)",
        "Det 'y'",
        "Trilu ''",
    ]


@pytest.mark.runtimes
@needs_qnn
def test_every_node_is_on_the_npu(small_decoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "tokens.jsonl"  # every token of the vocabulary is seen, often
    data.write_text(json.dumps({"tokens": np.random.default_rng(0).integers(0, 64, 1024).tolist()}))
    result = osl.compile(small_decoder, tmp_path / "out", target="qnn-htp", recipe="w8a16", shape=SHAPE, calib=data)
    names = {file.path for file in result.manifest.artifact.files}
    assert {CONTEXT_NAME, PLACEMENT_NAME} < names
    placement = json.loads((result.path / PLACEMENT_NAME).read_text())["nodes"]
    assert set(placement) == {"NPU"}
    assert len(placement["NPU"]) > 20
    assert result.manifest.verify is not None
    assert (result.manifest.verify.cosine or 0) >= COSINE_16
    got = QNN_HTP.open(result.path / "model.onnx").inputs
    assert [list(info.shape or ()) for info in got if info.name == "input_ids"] == [[1, 8]]


def with_operator(op: str, path: Path) -> Path:
    """y = op (x) + x."""
    text = (
        '<ir_version: 10, opset_import: ["" : 17]> '
        f"g (float[1, 8] x) => (float[1, 8] y) {{ e = {op} (x) y = Add (e, x) }}"
    )
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@needs_qnn
def test_what_the_lint_finds_fails_the_compile(tmp_path: Path) -> None:
    source = with_operator("Erf", tmp_path / "erf.onnx")
    data = tmp_path / "data.npz"
    np.savez(data, x=np.linspace(-3, 3, 8, dtype=np.float32)[None])
    with pytest.raises(IllegalGraphError, match="HTP has no Erf") as caught:
        osl.compile(source, tmp_path / "out", target="qnn-htp", recipe="w8a16", calib=data)
    assert (caught.value.exit_code, caught.value.where) == (4, "Erf 'e'")
    assert "Gelu" in caught.value.todo
    assert [violation.where for violation in caught.value.violations] == ["Erf 'e'"]
    assert not (tmp_path / "out").exists()


@pytest.mark.runtimes
@needs_qnn
def test_nodes_for_the_cpu_fail_the_compile(tmp_path: Path) -> None:
    source = with_operator("Atanh", tmp_path / "atanh.onnx")  # no rule of the lint
    data = tmp_path / "data.npz"
    np.savez(data, x=np.linspace(-0.5, 0.5, 8, dtype=np.float32)[None])
    with pytest.raises(VendorError) as caught:
        osl.compile(source, tmp_path / "out", target="qnn-htp", recipe="w8a16", calib=data, force=True)
    assert caught.value.exit_code == 4
    assert "Atanh 'e'" in caught.value.what
    assert "outside of the model" in caught.value.todo
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.failed.log").stat().st_size > 0
    osl.compile(source, tmp_path / "out", target="portable", recipe="safe")
    assert not (tmp_path / "out.failed.log").exists()


@pytest.mark.runtimes
@needs_qnn
def test_a_pair_of_graphs_in_the_simulator(small_decoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "tokens.jsonl"
    data.write_text(json.dumps({"tokens": np.random.default_rng(0).integers(0, 64, 1024).tolist()}))
    shape = ("batch=1", "prefill:seq=8,past=0,total=8", "decode:seq=1,past=15,total=16")
    options = {"share_weights": "1"}
    result = osl.compile(
        small_decoder,
        tmp_path / "out",
        target="qnn-htp",
        recipe="w8a16",
        shape=shape,
        calib=data,
        target_options=options,
    )
    found = result.manifest.generation
    assert found is not None
    assert found.top1_agreement == 1.0
    for graph in result.manifest.graphs:
        assert graph.verify is not None
        assert (graph.verify.cosine or 0) >= COSINE_16
    own = [sum(file.stat().st_size for file in result.path.glob(f"{stem}_ctx*.bin")) for stem in ("model", "decode")]
    shared = sum(file.stat().st_size for file in result.path.glob("*_shared_ctx*.bin"))
    assert 0 < shared < sum(own)
    assert len(list(result.path.glob("*.data"))) <= 1


@pytest.mark.runtimes
@needs_qnn
def test_a_compiler_that_takes_too_long_is_ended(small_decoder: Path, tmp_path: Path) -> None:
    impatient = replace(QNN_HTP, seconds=0.01)
    with pytest.raises(VendorError, match=r"timed out after 0.01 s.*nothing was published") as caught:
        impatient.finish(small_decoder)
    assert "seconds=N" in caught.value.todo
    assert not (small_decoder.parent / CONTEXT_NAME).exists()
