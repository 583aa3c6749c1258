"""Which consumers there are, what they take, and how one of them is run on one model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.bounded import run_bounded

__all__ = ["CONSUMERS", "TOLERANCE", "Consumer", "Form", "Report", "consume", "find_consumer"]

Array = NDArray[Any]
#: "source": the model as it is, with fixed sizes. "portable": as compiled for that target. "primitive": norms, Gelu
#: and attention taken apart into operators of opset 20 or older, no infinity. "unpadded": that, with masks fixed to
#: one, positions to 0, 1, 2, ... and segments to 0, for one text without padding. "folder": a whole artifact, sizes not
#: fixed.
Form = Literal["source", "portable", "primitive", "unpadded", "folder"]
Status = Literal["runs", "differs", "refused", "failed", "not installed", "not for this model"]

#: Of the largest result. Sums in another order and approximations of exp and erf move results of a dozen layers by 1e-6
#: to 1e-3 of it (MNN's Gelu most); an axis or a mask that is read wrongly moves them by 0.1 and more.
TOLERANCE = 1e-2

_WORKER = "onnxslim_llm.consumers.worker"
_SECONDS = 600.0


@dataclass(frozen=True)
class Consumer:
    """A program that reads ONNX models.

    Attributes:
        name: As it is called on the command line; also the adapter's module.
        title: What people know it as, and the way in.
        packages: Distributions that it needs; the first one's version is told.
        extra: Optional dependency of this project that brings them.
        forms: Forms of a model that are worth trying, the most natural first.
        python: Environment variable with the interpreter of another environment that has the packages.
        decoders_only: It takes nothing but decoders with a KV cache.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    extra: str = ""
    forms: tuple[Form, ...] = ("source", "portable", "primitive")
    python: str = ""
    decoders_only: bool = False

    def installed(self) -> tuple[bool, str]:
        """Return whether it can be run here, and its version or what to install."""
        if self.python and os.environ.get(self.python):
            return True, f"{self.packages[0]} of {os.environ[self.python]}"
        try:
            found = [version(package) for package in self.packages]
        except PackageNotFoundError as error:
            way = f'pip install "onnxslim-llm[{self.extra}]"' if self.extra else f"pip install {error.name}"
            other = f", or set {self.python} to an interpreter that has it" if self.python else ""
            return False, f"{error.name} is not installed: {way}{other}"
        return True, f"{self.packages[0]} {found[0]}"

    @property
    def interpreter(self) -> str:
        """The interpreter that has the packages; "" for this one."""
        return os.environ.get(self.python, "") if self.python else ""


CONSUMERS: tuple[Consumer, ...] = (
    Consumer("onnxruntime", "ONNX Runtime, CPU", ("onnxruntime",), forms=("source", "portable")),
    Consumer("onnx_reference", "onnx.reference", ("onnx",)),
    Consumer("openvino", "OpenVINO, CPU", ("openvino",), "openvino"),
    Consumer("mnn", "MNN (MNNConvert)", ("MNN",), "mnn", forms=("source", "primitive")),
    Consumer("ncnn", "ncnn (pnnx)", ("ncnn", "pnnx"), "ncnn", forms=("source", "primitive", "unpadded")),
    Consumer(
        *("litert", "LiteRT (onnx2tf)", ("onnx2tf", "ai-edge-litert"), "litert"),
        forms=("primitive", "unpadded", "source"),  # onnx2tf takes minutes for what exporters write
        python="ONNXSLIM_LLM_LITERT_PYTHON",
    ),
    Consumer(*("genai", "onnxruntime-genai", ("onnxruntime-genai",), "genai"), forms=("folder",), decoders_only=True),
    Consumer(
        *("tvm", "TVM (Relax)", ("apache-tvm",), "tvm"),
        forms=("source", "portable", "primitive"),
        python="ONNXSLIM_LLM_TVM_PYTHON",
    ),
)


def find_consumer(name: str) -> Consumer:
    """Return the consumer `name`.

    Raises:
        KeyError: There is none.
    """
    return {consumer.name: consumer for consumer in CONSUMERS}[name]


@dataclass(frozen=True)
class Report:
    """What a consumer did with one form of a model.

    Attributes:
        consumer: Its name.
        form: Which form it was given; None if it was not run.
        status: "runs": its results are the source's up to `TOLERANCE`. "differs": they are not. "refused": it named
            operators that it does not have. "failed": anything else.
        detail: Version, or what went wrong, one line.
        unsupported: Operators, or "Op 'node'", that it refused.
        max_abs: Largest difference to the source's results, over all outputs.
        absmax: Largest magnitude of the source's results.
        output: Where `max_abs` is.
        seconds: Of conversion and run.
    """

    consumer: str
    form: Form | None
    status: Status
    detail: str = ""
    unsupported: tuple[str, ...] = ()
    max_abs: float | None = None
    absmax: float | None = None
    output: str = ""
    seconds: float | None = None


def consume(
    consumer: Consumer,
    model: Path,
    form: Form,
    feeds: Mapping[str, Array],
    expected: Mapping[str, Array],
    *,
    seconds: float = _SECONDS,
) -> Report:
    """Let a consumer convert and run a model, and compare its results.

    Args:
        consumer: It must be installed.
        model: The .onnx file; for the form "folder" of a whole artifact.
        form: Said in the report.
        feeds: Inputs by name; those that the model does not take are left out by the adapter.
        expected: Results of the source by name.
        seconds: Time limit of conversion and run together.
    """
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as name:
        folder = Path(name)
        np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]  # names are no options
        request = {
            "consumer": consumer.name,
            "model": str(model.resolve()),
            "feeds": str(folder / "feeds.npz"),
            "results": str(folder / "results.npz"),
            "folder": name,
            "outputs": list(expected),
        }
        outcome = run_bounded(_WORKER, request, seconds=seconds, python=consumer.interpreter)
        reply: dict[str, Any] = outcome.answer or {}
        if not outcome.finished or reply.get("error"):
            why = reply.get("error") or f"{outcome.ended}: {_last_line(outcome.log)}"
            unsupported = tuple(reply.get("unsupported", ()))
            return Report(consumer.name, form, "refused" if unsupported else "failed", why, unsupported)
        with np.load(folder / "results.npz") as results:
            got = {key: results[key] for key in results.files}
        return _compared(consumer.name, form, got, expected, float(reply["seconds"]))


def _compared(name: str, form: Form, got: Mapping[str, Array], expected: Mapping[str, Array], seconds: float) -> Report:
    worst, where, largest = 0.0, "", 0.0
    for key, reference in expected.items():
        if key not in got:
            return Report(name, form, "failed", f"it gives no output '{key}'")
        result = got[key]
        if result.shape != reference.shape:
            if result.size != reference.size:
                what = f"output '{key}' has the shape {list(result.shape)}, not {list(reference.shape)}"
                return Report(name, form, "failed", what)
            result = result.reshape(reference.shape)
        difference = np.abs(result.astype(np.float64) - reference.astype(np.float64))
        if not np.isfinite(difference).all():
            return Report(name, form, "failed", f"output '{key}' is not finite")
        largest = max(largest, float(np.abs(reference.astype(np.float64)).max(initial=0.0)))
        if float(difference.max(initial=0.0)) >= worst:
            worst, where = float(difference.max(initial=0.0)), key
    status: Status = "runs" if worst <= TOLERANCE * largest else "differs"
    return Report(name, form, status, max_abs=worst, absmax=largest, output=where, seconds=seconds)


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
