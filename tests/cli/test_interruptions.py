"""A compile that is killed or interrupted at any moment: nothing is lost, nothing is half, and --resume goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from killed_child import killed_before

from onnxslim_llm import compiler
from onnxslim_llm.artifact.hashing import file_sha256
from onnxslim_llm.artifact.manifest import read_manifest

_OPERATIONS = frozenset(
    ["open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile", "ctypes.call_function"]
)
_LIMIT = 5000  # far more file operations than a compile of a small model has
_DEADLINE = 60.0  # seconds to wait for a process to come to a certain point


def compile_here(model: Path, out: Path, recipe: str, *, resume: bool) -> None:
    compiler.compile(model, out, recipe=recipe, verify="off", force=True, resume=resume, jobs=2)


def whole_recipe(out: Path) -> str:
    """The recipe of the artifact at `out`, after checking that each file is the one its manifest tells."""
    manifest = read_manifest(out)
    for entry in manifest.artifact.files:
        assert file_sha256(out / entry.path) == entry.sha256
    return str(manifest.recipe["name"])


@pytest.mark.parametrize(
    ("resume", "stride"),
    [
        pytest.param(False, 11, id="restart"),
        pytest.param(True, 11, id="resume"),
        pytest.param(False, 1, id="restart, every operation", marks=pytest.mark.slow),
        pytest.param(True, 1, id="resume, every operation", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_file_operation(decoder: Path, tmp_path: Path, resume: bool, stride: int) -> None:
    out = tmp_path / "build"
    compile_here(decoder, out, "int8", resume=False)
    expected = tmp_path / "expected"
    compile_here(decoder, expected, "int4-fast", resume=False)
    seen = set()
    for operation in range(0, _LIMIT, stride):
        died = killed_before(operation, partial(compile_here, decoder, out, "int4-fast", resume=resume), _OPERATIONS)
        seen.add(whole_recipe(out))
        if not died:
            break
        if whole_recipe(out) == "int4-fast":  # start again from the old artifact; what else was left behind stays
            compile_here(decoder, out, "int8", resume=False)
    else:
        pytest.fail("the compile never ends")
    assert "int8" in seen
    assert read_manifest(out).artifact.files == read_manifest(expected).artifact.files
    assert sorted(os.listdir(tmp_path)) == ["build", "expected"]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until `path` exists while the process runs."""
    end = time.monotonic() + _DEADLINE
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM], ids=["SIGINT", "SIGKILL", "SIGTERM"])
def test_interrupted_process_resumes(
    decoder: Path, tmp_path: Path, environment: dict[str, str], kill: signal.Signals
) -> None:
    command = [sys.executable, "-m", "onnxslim_llm", "compile", str(decoder), "-o", "build", "--recipe", "int4-fast"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(tmp_path / ".build.partial" / "model.onnx", process)
        process.send_signal(kill)
        _, text = process.communicate(timeout=_DEADLINE)
    assert process.returncode == (130 if kill == signal.SIGINT else -kill), text
    if kill == signal.SIGINT:
        assert "error: interrupted" in text
        assert "--resume" in text
        assert "Traceback" not in text
    assert not (tmp_path / "build").exists()
    assert (tmp_path / ".build.partial" / ".journal").exists()
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    assert whole_recipe(tmp_path / "build") == "int4-fast"
    assert os.listdir(tmp_path) == ["build"]
