"""What the tests demand of a command's end: of errors, of what is left on disk, and of artifacts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

Array = np.ndarray[Any, Any]

#: Largest difference of outputs that another order of float32 operations explains: outputs here are below 30, and the
#: deepest model has some hundred operations of relative rounding 6e-8.
ROUNDING = 30 * 200 * 6e-8


GATE = 4
"""Exit code of an artifact that missed a gate."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


def refused(outcome: Outcome, code: int, *names: str) -> dict[str, str]:
    """Check that a command ended with `code` and one error of at most three lines that has all `names` in it.

    Remarks ("note: ") may come before. Returns the lines by label: what, where, to do.
    """
    assert outcome.code == code, f"exit code {outcome.code}, {code} wanted: {outcome.err}"
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if not line.startswith("note: ")]
    if code == GATE:  # the table with the figures comes first
        lines = lines[next((i for i, line in enumerate(lines) if line.startswith("error: ")), 0) :]
    assert lines, "no message"
    assert lines[0].startswith("error: "), outcome.err
    parts = {"what": lines[0].removeprefix("error: ")}
    for line in lines[1:]:
        label, _, text = line.strip().partition(": ")
        assert label in ("where", "to do"), outcome.err
        assert label not in parts, outcome.err
        parts[label] = text
    assert all(parts.values()), outcome.err
    message = "\n".join(lines)
    for name in names:
        assert name in message, f"'{name}' is not named in: {message}"
    return parts


def nothing_left(folder: Path, *expected: str) -> None:
    """Check that `folder` holds these entries and no others, hidden ones included."""
    assert sorted(os.listdir(folder)) == sorted(expected)


def whole(folder: Path, valid: bool = True) -> dict[str, Any]:
    """Check an artifact without the compiler's help: all files are there, as the manifest has them, and valid ONNX.

    Returns the manifest. `valid=False` is for sources that onnx.checker refuses, too.
    """
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entries = [*manifest["artifact"]["files"], *manifest["artifact"]["carried"]]
    for entry in entries:
        content = (folder / entry["path"]).read_bytes()
        assert len(content) == entry["bytes"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    listed = {entry["path"] for entry in entries} | {"manifest.json", "report.html"}
    assert set(os.listdir(folder)) == listed
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    if valid:
        onnx.checker.check_model(folder / "model.onnx", full_check=False)
    return manifest


def model_bytes(folder: Path) -> dict[str, bytes]:
    """The files of the model in an artifact, without those that tell of time and machine."""
    names = [entry["path"] for entry in json.loads((folder / "manifest.json").read_bytes())["artifact"]["files"]]
    return {name: (folder / name).read_bytes() for name in names}


def session(model: Path | onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Open a model in ONNX Runtime on one thread, its optimisations on, as a deployment does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def feeds(opened: onnxruntime.InferenceSession, length: int = 7, vocab: int = 250) -> dict[str, Array]:
    """Random inputs for a model of these tests: ids, masks, positions, caches with 3 tokens in them, floats."""
    rng = np.random.default_rng(11)
    inputs = opened.get_inputs()
    past = 3 if any(item.name.startswith("past") for item in inputs) else 0
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    found: dict[str, Array] = {}
    for item in inputs:
        sizes = {"past_sequence_length": past, "total_sequence_length": past + length, "sequence_length": length}
        shape = [d if isinstance(d, int) else sizes.get(d, 2) for d in item.shape]
        if item.type in kinds:
            found[item.name] = (rng.standard_normal(shape) * 0.5).astype(kinds[item.type])
        elif item.type == "tensor(bool)":
            found[item.name] = np.ones(shape, bool)
        elif "mask" in item.name:
            found[item.name] = np.ones(shape, np.int64)
        elif "position" in item.name:
            found[item.name] = np.broadcast_to(np.arange(past, past + shape[-1]), shape).astype(np.int64)
        elif not shape:
            found[item.name] = np.array(3, np.int64)
        else:
            found[item.name] = rng.integers(0, vocab, shape)
    return found


def results(model: Path | onnx.ModelProto, inputs: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Run a model once; the outputs by name."""
    opened = session(model)
    names = [item.name for item in opened.get_outputs()]
    return dict(zip(names, opened.run(None, dict(inputs or feeds(opened))), strict=True))


def same_results(source: Path, artifact: Path, tolerance: float = ROUNDING) -> None:
    """Check that two models give the same outputs, by name, on the same inputs."""
    wanted, found = results(source), results(artifact)
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        assert found[name].shape == array.shape, name
        assert found[name].dtype == array.dtype, name
        assert np.abs(found[name].astype(np.float64) - array.astype(np.float64)).max(initial=0.0) <= tolerance, name


def noise(source: Path, artifact: Path) -> float:
    """The largest relative error (RMS of the difference over RMS of the source's) among the outputs."""
    wanted, found = results(source), results(artifact)
    assert wanted.keys() == found.keys()
    ratios = [0.0]
    for name, array in wanted.items():
        reference = array.astype(np.float64)
        assert found[name].shape == array.shape, name
        difference = np.sqrt(np.mean(np.square(found[name].astype(np.float64) - reference))) if array.size else 0.0
        ratios.append(float(difference / (np.sqrt(np.mean(np.square(reference))) or 1.0)) if array.size else 0.0)
    return max(ratios)
