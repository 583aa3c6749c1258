"""What graphs between two passes are run on, and compiles that quantize activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxslim_llm import compiler
from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.defaults import remedy_of
from onnxslim_llm.compiler.lowering import in_order, lowering_passes
from onnxslim_llm.compiler.observation import SampleSource, text_of_steps
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.errors import ModelError
from onnxslim_llm.recipe import Recipe, preset_names
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.targets import get_target

#: Two layers with biases, as an encoder's feed-forward part has them.
TEXT = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[n, 32] x) => (float[n, 32] y) {
        a = MatMul (x, W)
        b = Add (a, c)
        h = Relu (b)
        y = MatMul (h, V)
    }"""
#: "at least" of the issue, for 8-bit activations.
COSINE = 0.99


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in {"W": (32, 64), "c": (64,), "V": (64, 32)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(proto, tmp_path / "layers.onnx")
    return tmp_path / "layers.onnx"


def _source(model: Path, data: Path | None, folder: Path) -> SampleSource:
    return SampleSource(Calibrator(model, data, folder / "statistics", 1, Silent()))


def test_without_data_a_decoder_writes_text_and_says_so(sample_dir: Path, tmp_path: Path) -> None:
    source = _source(sample_dir / "model.onnx", None, tmp_path)
    session = open_session(sample_dir / "model.onnx", threads=1)
    samples = list(source.feeds(session))
    assert len(samples) > 1
    assert (samples[0]["attention_mask"] == 0).any()  # otherwise a mask would have no range
    assert all((s["attention_mask"] == 1).all() for s in samples[1:])
    (note,) = source.calibrator.notes
    assert "no calibration data" in note
    assert "the model wrote itself" in note
    again = list(source.feeds(session))
    np.testing.assert_array_equal(again[-1]["input_ids"], samples[-1]["input_ids"])
    assert source.calibrator.notes == [note]


def test_without_data_other_models_get_random_inputs(layers: Path, tmp_path: Path) -> None:
    source = _source(layers, None, tmp_path)
    samples = list(source.feeds(open_session(layers, threads=1)))
    assert {s["x"].shape[1] for s in samples} == {32}
    assert "random inputs" in source.calibrator.notes[0]


def test_text_is_fed_in_windows_with_the_rest_at_the_end(sample_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text((sample_dir / "calib.txt").read_text()[:6000])
    source = _source(sample_dir / "model.onnx", tmp_path / "text.txt", tmp_path)
    samples = list(source.feeds(open_session(sample_dir / "model.onnx", threads=1)))
    lengths = [s["input_ids"].shape[1] for s in samples[1:]]
    assert lengths[:-1] == [lengths[0]] * (len(lengths) - 1)
    assert 0 < lengths[-1] <= lengths[0]
    assert source.calibrator.notes == []


def test_passes_on_lowered_graphs_come_behind_the_lowering() -> None:
    target = get_target("ort-cpu")
    lowering = lowering_passes(target, "separate", None)
    names = [step.name for step in in_order(Recipe.load("w8a8").build(), lowering)]
    assert names[-2:] == ["quantize_activations", "deduplicate_initializers"]
    plain = in_order(Recipe.load("safe").build(), lowering)
    assert [step.name for step in plain][-len(lowering) :] == [step.name for step in lowering]


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w8a16", "w4a8", "w4a16"])
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_presets_compile_without_data(layers: Path, tmp_path: Path, recipe: str, target: str) -> None:
    assert recipe in preset_names()
    settings = ["quantize_weights.min_elements=0"] if recipe.startswith("w4") else []
    result = compiler.compile(layers, tmp_path / "out", target=target, recipe=recipe, settings=settings, jobs=1)
    verify = result.manifest.verify
    assert verify is not None
    assert all(gate.ok for gate in verify.gates)
    if not recipe.startswith("w4"):
        assert verify.cosine is not None
        assert verify.cosine >= COSINE
    operators = result.manifest.artifact.ops
    integers = {"QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear", "com.microsoft::MatMulNBits"}
    if not (recipe == "w8a16" and target == "ort-cpu"):  # no kernels, so that everything stays float
        assert integers & set(operators)


def test_the_warning_is_in_the_manifest(layers: Path, tmp_path: Path) -> None:
    result = compiler.compile(layers, tmp_path / "out", target="ort-cpu", recipe="w8a8", jobs=1)
    assert any("no calibration data" in note for note in result.manifest.notes)


def test_given_inputs_are_used(layers: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.full((3, 32), 7, np.float32))
    np.savez(tmp_path / "b.npz", x=np.full((2, 32), np.nan, np.float32))
    options = {"target": "ort-cpu", "recipe": "w8a8", "jobs": 1, "verify": "off"}
    result = compiler.compile(layers, tmp_path / "out", calib=tmp_path / "a.npz", **options)  # type: ignore[arg-type]
    assert not any("no calibration data" in note for note in result.manifest.notes)
    with pytest.raises(ModelError, match="NaN") as caught:
        compiler.compile(layers, tmp_path / "bad", calib=tmp_path / "b.npz", **options)  # type: ignore[arg-type]
    assert caught.value.where == "tensor 'x'"
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_a_decoder_in_8_bits_is_close_to_itself(sample_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text((sample_dir / "calib.txt").read_text()[:6000])
    source = sample_dir / "model.onnx"
    result = compiler.compile(source, tmp_path / "out", target="ort-cpu", recipe="w8a8", calib=tmp_path / "text.txt")
    verify = result.manifest.verify
    assert verify is not None
    assert verify.cosine is not None
    assert verify.cosine >= COSINE
    record = next(p for p in result.manifest.passes if p.name == "quantize_activations")
    assert record.detail["operators"]["MatMul"] > 15


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a16"])
def test_inspection_says_what_comes_before_the_data(layers: Path, recipe: str) -> None:
    found = compiler.inspect(layers, recipe=recipe, target="ort-cpu")
    assert found.recipe == recipe
    assert "quantize_activations" not in {site.name for site in found.sites}


def test_caches_hold_what_the_model_wrote_where_ranges_come_from_them(sample_dir: Path, tmp_path: Path) -> None:
    path, folder = sample_dir / "model.onnx", tmp_path / "statistics"
    quantized, exact = Recipe.load("w8a16").build(), Recipe.load("safe").build()
    silent = Calibrator(path, None, folder, 1, Silent())
    assert text_of_steps(silent, exact) is None  # random tokens will do where nothing is rounded
    written = text_of_steps(silent, quantized)
    assert written is not None
    assert "the model wrote itself" in silent.notes[0]
    asked = Calibrator(path, Path("self"), folder, 1, Silent())
    np.testing.assert_array_equal(text_of_steps(asked, quantized), written)
    assert asked.notes == []
    text = tmp_path / "text.jsonl"
    text.write_text('{"tokens": [3, 4, 5]}\n')
    given = Calibrator(path, text, folder, 1, Silent())
    np.testing.assert_array_equal(text_of_steps(given, quantized), [3, 4, 5])


def test_what_is_no_decoder_has_no_text(layers: Path, tmp_path: Path) -> None:
    calibrator = Calibrator(layers, None, tmp_path / "statistics", 1, Silent())
    assert text_of_steps(calibrator, Recipe.load("w8a16").build()) is None
    assert calibrator.notes == []


@pytest.mark.parametrize(
    ("recipe", "target", "data", "what"),
    [
        ("int4-fast", "portable", False, "gentler recipe (int8)"),
        ("w8a8", "qnn-htp", False, "--calib FILE"),
        ("w8a8", "qnn-htp", True, "recipe w8a16"),
        ("w8a8", "ort-cpu", True, "recipe int8"),
    ],
)
def test_what_to_do_after_a_missed_gate(recipe: str, target: str, data: bool, what: str) -> None:
    assert what in remedy_of(Recipe.load(recipe), get_target(target), with_data=data)
