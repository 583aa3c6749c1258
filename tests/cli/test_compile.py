"""compile from end to end: what is published, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxslim_llm.artifact.hashing import file_sha256
from onnxslim_llm.artifact.manifest import read_manifest

Run = Callable[..., subprocess.CompletedProcess[str]]

LOSSY_WITH_LOSSLESS_GATES = """
description = "four bits that are to be exact, which cannot be"
gates = "lossless"

[[passes]]
name = "quantize_weights"
"""


def whole(folder: Path) -> None:
    """Check that every file of an artifact is the one that its manifest tells."""
    manifest = read_manifest(folder)
    for entry in [*manifest.artifact.files, *manifest.artifact.carried]:
        assert file_sha256(folder / entry.path) == entry.sha256
    assert (folder / "report.html").stat().st_size > 10_000


def test_publishes_a_verified_artifact(cli: Run, decoder: Path, tmp_path: Path) -> None:
    done = cli("compile", decoder, "-o", "build")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "model files" in done.stderr
    assert "recipe 'int4': the default for decoders" in done.stderr
    whole(tmp_path / "build")
    assert sorted(os.listdir(tmp_path)) == ["build"]
    manifest = read_manifest(tmp_path / "build")
    assert manifest.verify is not None
    assert manifest.verify.gates
    assert not manifest.failed_gates
    assert manifest.artifact.bytes < 0.35 * manifest.source.bytes


def test_json_is_the_manifest_and_nothing_else(cli: Run, decoder: Path, tmp_path: Path) -> None:
    done = cli("compile", decoder, "-o", "build", "--json", "--verify", "off")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "build" / "manifest.json").read_text())
    assert json.loads(done.stdout)["verify"] is None


def test_quiet_says_nothing(cli: Run, decoder: Path) -> None:
    done = cli("compile", decoder, "-o", "build", "-q", "--verify", "off")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_default_folder_is_named_after_the_model(cli: Run, decoder: Path, tmp_path: Path) -> None:
    assert cli("compile", decoder, "--verify", "off").returncode == 0
    whole(tmp_path / "tiny.slim")


def test_an_existing_folder_needs_force(cli: Run, decoder: Path, tmp_path: Path) -> None:
    arguments = ["compile", decoder, "-o", "build", "--verify", "off"]
    assert cli(*arguments).returncode == 0
    before = (tmp_path / "build" / "manifest.json").stat().st_mtime_ns
    refused = cli(*arguments)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert (tmp_path / "build" / "manifest.json").stat().st_mtime_ns == before
    assert cli(*arguments, "--force", "--recipe", "int8").returncode == 0
    assert read_manifest(tmp_path / "build").recipe["name"] == "int8"


def test_the_number_of_jobs_does_not_change_a_byte(cli: Run, decoder: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        assert cli("compile", decoder, "-o", f"jobs{jobs}", "--verify", "off", "--jobs", jobs).returncode == 0
    first, second = (read_manifest(tmp_path / f"jobs{jobs}").artifact.files for jobs in (1, 2))
    assert first == second


def test_a_failed_gate_publishes_nothing(cli: Run, decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "exact.toml").write_text(LOSSY_WITH_LOSSLESS_GATES)
    done = cli("compile", decoder, "-o", "build", "--recipe", "exact.toml", "--json")
    assert done.returncode == 4
    assert sorted(os.listdir(tmp_path)) == ["build.failed.json", "exact.toml"]
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "build.failed.json").read_text())
    assert any(not gate["ok"] for gate in printed["verify"]["gates"])
    assert len(done.stderr.splitlines()) <= 3 + len(printed["notes"]) + 1
    assert "Traceback" not in done.stderr


def test_a_folder_carries_its_tokenizer_along(cli: Run, decoder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in decoder.parent.glob("tiny.onnx*"):
        shutil.copy(file, source)
    (source / "tokenizer.json").write_text("{}")
    (source / "weights.safetensors").write_text("no")
    assert cli("compile", source, "-o", "build", "--verify", "off").returncode == 0
    whole(tmp_path / "build")
    carried = [entry.path for entry in read_manifest(tmp_path / "build").artifact.carried]
    assert carried == ["genai_config.json", "tokenizer.json"]
    assert not (tmp_path / "build" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "ort-gpu"], "unknown target 'ort-gpu'"),
        (["--recipe", "int5"], "unknown recipe 'int5'"),
        (["--set", "quantize_wieghts.bits=4"], "quantize_wieghts"),
        (["--set", "quantize_weights.bit=4"], "has no option 'bit'"),
        (["--set", "quantize_weights.bits=many"], "bits"),
        (["--set", "nonsense"], "PASS.OPTION=VALUE"),
        (["--calib", "missing.txt"], "calibration"),
    ],
)
def test_usage_errors_leave_nothing(
    cli: Run, decoder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = cli("compile", decoder, "-o", "build", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def broken(path: Path, how: str) -> Path:
    """A model file that is broken in one way."""
    if how == "text":
        path.write_text("this is not a model")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        model = onnx.load(path, load_external_data=how == "nan")
        if how == "nan":
            array = numpy_helper.to_array(next(t for t in model.graph.initializer if len(t.dims) == 2)).copy()
            array[0, 0] = np.nan
            tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            path.with_name("tensor").write_text(tensor.name)
        elif how == "cycle":
            node = model.graph.node[10]
            node.input[0] = model.graph.node[-1].output[0]
        else:
            for tensor in model.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = {"missing data": "nowhere.data", "path outside": "../secret.data"}[how]
        onnx.save(model, path)
    return path


@pytest.mark.parametrize("how", ["text", "empty", "truncated", "missing data", "path outside", "cycle", "nan"])
def test_broken_models_give_clear_errors(cli: Run, decoder: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for file in decoder.parent.glob("tiny.onnx*"):
        shutil.copy(file, folder)
    model = broken(folder / "tiny.onnx", how)
    done = cli("compile", model, "-o", "build")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "build").exists()
    assert not list(tmp_path.glob(".build*"))
    if how == "nan":
        assert (folder / "tensor").read_text() in done.stderr
    if how == "path outside":
        assert "secret" in done.stderr


def test_a_disk_that_is_full_is_told_and_resumable(cli: Run, decoder: Path, tmp_path: Path) -> None:
    """The kernel's file size limit stands for the disk: the write fails in the middle of the weights."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    arguments = ["compile", decoder, "-o", "build", "--verify", "off"]
    done = cli(*arguments, preexec_fn=limit)
    assert done.returncode == 5, done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "build").exists()
    assert cli(*arguments, "--resume").returncode == 0
    whole(tmp_path / "build")
    assert os.listdir(tmp_path) == ["build"]


def test_output_below_a_file_is_told(cli: Run, decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("compile", decoder, "-o", "file/build")
    assert done.returncode == 5, done.stderr
    assert "-o" in done.stderr
