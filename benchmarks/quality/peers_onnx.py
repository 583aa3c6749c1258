"""The peers whose artifact is an ONNX file: ONNX Runtime, nncf, onnxslim and onnxsim."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from contestants import Contestant, NothingChanged, package_stamp, weight_bytes
from subjects import Subject

#: onnxsim keeps every activation of its calibration data.
_FEW = 8


def onnx_peers() -> Iterator[Contestant]:
    """All of them."""
    yield from _onnxruntime()
    yield from _nncf()
    yield from _slimmers()


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def _onnxruntime() -> Iterator[Contestant]:
    stamp = package_stamp("onnxruntime")
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
    stamp = package_stamp("nncf")
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
    yield Contestant("onnxslim", "float16", _onnxslim_half, package_stamp("onnxslim"))
    for name, options in (
        ("weight-only int8, per block", {"dtype": "int8", "granularity": "per_block"}),
        ("weight-only int4", {"dtype": "int4"}),
    ):
        yield Contestant("onnxsim", name, partial(_onnxsim, options), package_stamp("onnxsim"))


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
