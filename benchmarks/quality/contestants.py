"""Who is in the quality table, and how each makes its artifact."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gguf_peer
import numpy as np
import onnx
from subjects import Subject

from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.flow import compile as compile_model
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.recipe import Recipe, preset_names
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.targets import get_target

#: Makes an artifact in a folder and returns its file.
Make = Callable[[Subject, Path], Path]

#: onnxsim keeps every activation of its calibration data.
_FEW = 8

ROOT = Path(__file__).resolve().parents[2]


class NothingChanged(Exception):  # noqa: N818 - an outcome, not an error
    """A peer returned the model as it was."""


@dataclass(frozen=True)
class Contestant:
    """One line of the table.

    Attributes:
        group: whose it is.
        name: what is done.
        make: see `Make`.
        stamp: what a stored result depends on, besides the subject.
        target: opens the artifact; plain ONNX Runtime or llama.cpp if there is none.
        kinds: of subjects that it can do.
    """

    group: str
    name: str
    make: Make
    stamp: str
    target: str = ""
    kinds: tuple[str, ...] = ("decoder", "encoder")

    def open(self, artifact: Path) -> Path | Session:
        """Return an open session, or the file where llama.cpp runs it."""
        if artifact.suffix == ".gguf":
            return artifact
        return get_target(self.target).open(artifact, threads=1) if self.target else open_session(artifact, threads=1)


#: Our settings beside the presets: name, preset, what is changed, target.
SETTINGS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("4 bits everywhere, RTN", "int4", (_all_bits := (
        *("quantize_weights.embedding_bits=4", "quantize_weights.lm_head_bits=4", "quantize_weights.sensitive_bits=4"),
    )) + ("quantize_weights.method=rtn",), "portable"),
    ("4 bits everywhere", "int4", _all_bits, "portable"),
    ("4 bits everywhere, calibrated", "int4", (*_all_bits, "quantize_weights.method=calibrated"), "portable"),
    ("8 bits, calibrated", "int8", ("quantize_weights.method=calibrated",), "ort-cpu-ops"),
)  # fmt: skip
#: Sizes that bits are shared out for, in bits per weight, by the target; graph and norms come on top.
LADDER = {
    "ort-cpu-ops": (3, 3.5, 4, 4.2, 4.4, 4.6, 4.7, 4.8, 5, 5.3, 5.6, 6, 6.4, 7, 7.5, 8.2, 8.6),
    "ort-cpu": (4.4, 6),
}
#: The same without data, and with text that the model writes itself.
LADDER_WITHOUT_DATA = (4.4, 5, 6)
LADDER_OF_OWN_TEXT = (4.4, 4.8, 5.3, 5.6, 6.4, 7, 8.2)
#: The same with codes tuned afterwards, for decoders.
LADDER_TUNED = (3.5, 4, 4.4, 4.7)
#: Encoders are measured at these sizes only.
_ENCODER_SIZES = (4.4, 6, 8.2)


def ours(extra: tuple[tuple[str, str, tuple[str, ...], str], ...] = ()) -> Iterator[Contestant]:
    """All presets that change nothing but weights, the settings above, and the ladder of sizes."""
    code = _code_digest()
    for name in preset_names():
        recipe = Recipe.load(name)
        if [step.name for step in recipe.build() if not step.lossless] != ["quantize_weights"]:
            continue
        for target in ("portable", "ort-cpu-ops"):
            make = partial(_compiled, name, (), target)
            yield Contestant("ours", f"{name} ({target})", make, f"{code} {recipe.digest()}", target)
    for label, preset, settings, target in (*SETTINGS, *extra):
        make = partial(_compiled, preset, settings, target)
        yield Contestant("ours", f"{label} ({target})", make, f"{code} {preset} {settings}", target)
    for target, sizes in LADDER.items():
        for size in sizes:
            yield _rung(code, f"{size:g} bits, calibrated", "int4-calibrated", (), target, size)
    for size in LADDER_WITHOUT_DATA:
        searched = ("quantize_weights.method=search",)
        yield _rung(code, f"{size:g} bits, without data", "int4-calibrated", searched, "ort-cpu-ops", size)
    for size in LADDER_OF_OWN_TEXT:
        yield _rung(code, f"{size:g} bits, own text", "int4-probed", (), "ort-cpu-ops", size)
    for size in LADDER_TUNED:
        tuned = _rung(code, f"{size:g} bits, tuned", "int4-tuned", (), "ort-cpu-ops", size)
        yield replace(tuned, kinds=("decoder",))


def _rung(code: str, label: str, preset: str, settings: tuple[str, ...], target: str, size: float) -> Contestant:
    changed = (*settings, f"quantize_weights.target_bits={size:g}")
    kinds = ("decoder", "encoder") if size in _ENCODER_SIZES and preset != "int4-probed" else ("decoder",)
    make = partial(_compiled, preset, changed, target)
    return Contestant("ours", f"{label} ({target})", make, f"{code} {preset} {changed}", target, kinds)


def _compiled(preset: str, settings: tuple[str, ...], target: str, subject: Subject, folder: Path) -> Path:
    out = folder / "artifact"
    steps = Recipe.load(preset).with_settings(settings).build()
    itself = any(step.takes_own_text for step in steps)
    needs = any(step.wants_statistics for step in steps) and not itself
    compile_model(
        subject.model,
        out,
        target=target,
        recipe=preset,
        settings=settings,
        calib=subject.calibration if needs else None,
        jobs=1,
        verify="off",
        force=True,
        # Collected once for all of ours; a change of how they are collected changes their key.
        statistics=folder.parent / f"statistics-{subject.name}-{'self' if itself else 'data'}",
    )
    return out / "model.onnx"


def _code_digest() -> str:
    """Identify the compiler's own code: its results are measured again when it changes."""
    digest = hashlib.sha256()
    for part in ("onnxslim_llm", "passes", "custom_ops"):
        for file in sorted((ROOT / part).rglob("*")):
            if file.suffix in (".py", ".toml", ".cpp", ".hpp"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def peers() -> Iterator[Contestant]:
    """Everybody else."""
    yield from _onnxruntime()
    yield from _nncf()
    yield from _slimmers()
    yield from _llama_cpp()


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def _onnxruntime() -> Iterator[Contestant]:
    stamp = _stamp("onnxruntime")
    for name, algorithm, options in (
        ("RTN, 4 bits, block 32", "Default", {"bits": 4, "block_size": 32, "is_symmetric": False}),
        ("RTN, 4 bits, block 32, symmetric", "Default", {"bits": 4, "block_size": 32, "is_symmetric": True}),
        ("RTN, 4 bits, block 128", "Default", {"bits": 4, "block_size": 128, "is_symmetric": False}),
        ("k_quant", "KQuant", {}),
        ("HQQ, 4 bits, block 32", "HQQ", {"bits": 4, "block_size": 32}),
        ("GPTQ, block 32", "GPTQ", {"block_size": 32}),
        ("RTN, 8 bits, block 32", "Default", {"bits": 8, "block_size": 32, "is_symmetric": True}),
    ):
        yield Contestant("onnxruntime", name, partial(_matmul_nbits, algorithm, options), stamp)
    yield Contestant("onnxruntime", "int8, dynamic", _dynamic_int8, stamp)


def _matmul_nbits(algorithm: str, options: dict[str, Any], subject: Subject, folder: Path) -> Path:
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    if algorithm == "GPTQ":
        options = {**options, "calibration_data_reader": _reader(subject)}
    config = getattr(quantizer, f"{algorithm}WeightOnlyQuantConfig")(**options)
    blocks = {"block_size": options.get("block_size", 32)}
    given = {key: options[key] for key in ("bits", "is_symmetric") if key in options}
    worker = quantizer.MatMulNBitsQuantizer(onnx.load(subject.model), **blocks, **given, algo_config=config)
    worker.process()
    out = folder / "model.onnx"
    worker.model.save_model_to_file(str(out))
    return out


def _reader(subject: Subject) -> Any:
    """Calibration data as ONNX Runtime reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._samples = iter(subject.samples)

        def get_next(self) -> dict[str, Any] | None:
            """The next sample; None after the last one."""
            return next(self._samples, None)

    return Reader()


def _dynamic_int8(subject: Subject, folder: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = folder / "model.onnx"
    quantize_dynamic(subject.model, out, weight_type=QuantType.QInt8, per_channel=True)
    return out


# --- nncf -------------------------------------------------------------------------------------------------------------


def _nncf() -> Iterator[Contestant]:
    stamp = _stamp("nncf")
    four = {"mode": "INT4_ASYM", "group_size": 32, "ratio": 1.0}
    for name, options in (
        ("INT4_ASYM, group 32", four),
        ("INT4_ASYM, group 32, AWQ", {**four, "awq": True}),
        ("INT4_ASYM, group 32, scale estimation", {**four, "scale_estimation": True}),
        ("INT4_ASYM, group 32, AWQ, scale estimation", {**four, "awq": True, "scale_estimation": True}),
        ("INT4_ASYM, group 64", {**four, "group_size": 64}),
        ("INT8_ASYM", {"mode": "INT8_ASYM"}),
    ):
        yield Contestant("nncf", name, partial(_nncf_weights, options), stamp)


def _nncf_weights(options: dict[str, Any], subject: Subject, folder: Path) -> Path:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    given = {**options, "mode": nncf.CompressWeightsMode[options["mode"]]}
    if options.keys() & {"awq", "scale_estimation"}:
        given["dataset"] = nncf.Dataset(subject.samples)
    if "group_size" in options:  # rows of some models are no multiple of any usual group
        adjust = nncf.GroupSizeFallbackMode.ADJUST
        given["advanced_parameters"] = nncf.AdvancedCompressionParameters(group_size_fallback_mode=adjust)
    out = folder / "model.onnx"
    onnx.save(nncf.compress_weights(_opset_21(onnx.load(subject.model)), **given), out)
    return out


def _opset_21(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in an opset that has 4-bit types."""
    old = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) < 21
    return onnx.version_converter.convert_version(model, 21) if old else model


# --- onnxsim, onnxslim ------------------------------------------------------------------------------------------------


def _slimmers() -> Iterator[Contestant]:
    yield Contestant("onnxslim", "float16", _onnxslim_half, _stamp("onnxslim"))
    for name, options in (
        ("weight-only int8, per block", {"dtype": "int8", "granularity": "per_block"}),
        ("weight-only int4", {"dtype": "int4"}),
    ):
        yield Contestant("onnxsim", name, partial(_onnxsim, options), _stamp("onnxsim"))


def _onnxslim_half(subject: Subject, folder: Path) -> Path:
    import onnxslim

    out = folder / "model.onnx"
    onnx.save(onnxslim.slim(onnx.load(subject.model), dtype="fp16"), out)
    return out


def _onnxsim(options: dict[str, Any], subject: Subject, folder: Path) -> Path:
    import onnxsim

    # It passes over products whose shapes it is not told, and over opsets without 4-bit types.
    source = onnx.shape_inference.infer_shapes(_opset_21(onnx.load(subject.model)))
    config = onnxsim.QuantizationConfig(scheme="weight_only", calibration_data=subject.samples[:_FEW], **options)
    made = onnxsim.quantize(source, config)
    if weight_bytes(made) >= weight_bytes(source):
        raise NothingChanged("it changed nothing")
    out = folder / "model.onnx"
    onnx.save(made, out)
    return out


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _llama_cpp() -> Iterator[Contestant]:
    stamp = _stamp("llama-cpp-python")
    yield Contestant("llama.cpp", "F32", partial(_gguf, "", False), stamp, kinds=("decoder",))
    for kind in gguf_peer.CONTESTANTS:
        for weighted in (False, True):
            name = f"{kind}, imatrix" if weighted else kind
            yield Contestant("llama.cpp", name, partial(_gguf, kind, weighted), stamp, kinds=("decoder",))


def _gguf(kind: str, weighted: bool, subject: Subject, folder: Path) -> Path:
    assert subject.checkpoint is not None
    model = gguf_peer.read_checkpoint(subject.checkpoint)
    plain = folder / "f32.gguf"
    gguf_peer.write_gguf(model, plain)
    if not kind:
        return plain
    out = folder / "model.gguf"
    gguf_peer.quantize(plain, out, kind, _importances(subject, model.layers, folder) if weighted else None)
    return out


_IMPORTANCES: dict[str, dict[str, np.ndarray[Any, np.dtype[Any]]]] = {}


def _importances(subject: Subject, layers: int, folder: Path) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Mean squares of the inputs of every layer's products, on our calibration tokens: what llama-imatrix collects."""
    if subject.name in _IMPORTANCES:
        return _IMPORTANCES[subject.name]
    calibrator = Calibrator(subject.model, subject.calibration, folder / "statistics", 1, Silent())
    statistics = calibrator.statistics()
    assert statistics is not None
    squares = []
    for tap in statistics.taps:
        stored = statistics.of_tensor(tap.tensor)
        assert stored is not None
        both = stored.load()
        squares.append((both.fit.square + both.held.square) / (both.fit.count + both.held.count))
    calibrator.discard()
    assert len(squares) == 4 * layers + 1, "four inputs a layer, and the classifier's"
    readers = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
    _IMPORTANCES[subject.name] = {
        f"blk.{layer}.{part}.weight": squares[4 * layer + i]
        for layer in range(layers)
        for i, parts in enumerate(readers)
        for part in parts
    }
    return _IMPORTANCES[subject.name]


# --- measuring --------------------------------------------------------------------------------------------------------


def _stamp(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the distinct initializers and of the graph around them."""
    contents = {}
    for tensor in model.graph.initializer:
        data = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        contents[hashlib.sha256(data).digest()] = len(data)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        for part in ("raw_data", "float_data", "int32_data", "int64_data", "external_data"):
            tensor.ClearField(part)
    return sum(contents.values()) + bare.ByteSize()


def artifact_bytes(artifact: Path) -> int:
    """Bytes of an artifact, graph and weights, each distinct weight counted once."""
    return artifact.stat().st_size if artifact.suffix == ".gguf" else weight_bytes(onnx.load(artifact))


def clear(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
