"""Peak memory follows the largest piece of work, not the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_checks import whole
from reference_decoder import DecoderSpec, parameters, write

MIB = 1 << 20

#: 156 M parameters, 297 MiB of float16: an embedding and a classifier of 62 MiB each, and eight blocks of 21 MiB.
SPEC = DecoderSpec(
    vocab=32000, hidden=1024, layers=8, heads=16, kv_heads=4, head_dim=64, ffn=2816, dtype="float16", tied="no"
)

#: Bytes above the peak of a compile of a tiny model: two pieces of work in flight, of at most 64 MiB each.
IN_WORK = 2 * 64 * MIB

#: A process starts with the peak of the one that made it, so a small one has to stand between it and this one.
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""


def peak(environment: dict[str, str], folder: Path, *arguments: object) -> int:
    """Largest resident memory of a command in bytes, as the system reports it; not run in the checkout."""
    command = [sys.executable, "-m", "onnxslim_llm", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", LAUNCH, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    code, bytes_used = map(int, done.stdout.split())
    assert code == 0, done.stderr
    return bytes_used


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(SPEC, tmp_path_factory.mktemp("large") / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "target", "options"),
    [("int4-fast", "ort-cpu", ["--jobs", "2"]), ("safe", "portable", ["--jobs", "2"])],
    ids=["int4-fast", "safe"],
)
def test_peak_memory_is_far_below_the_model(
    tmp_path: Path, environment: dict[str, str], tiny: Path, large: Path, recipe: str, target: str, options: list[str]
) -> None:
    size = large.with_name("model.onnx.data").stat().st_size
    assert size >= 2 * parameters(SPEC) > 2 * IN_WORK
    fixed = ["--recipe", recipe, "--target", target, "--verify", "off", *options]
    least = peak(environment, tmp_path, "compile", tiny, "-o", tmp_path / "small", *fixed)
    found = peak(environment, tmp_path, "compile", large, "-o", tmp_path / "build", *fixed)
    assert found - least < IN_WORK
    told = json.loads((tmp_path / "build" / "manifest.json").read_bytes())["cost"]["peak_rss_bytes"]
    assert told == pytest.approx(found, rel=0.05)
    whole(tmp_path / "build")


def test_the_peak_that_is_told_is_that_of_the_command_alone(
    tmp_path: Path, environment: dict[str, str], tiny: Path
) -> None:
    """The system's own figure includes whoever started the process."""
    ballast = b"x" * (600 * MIB)
    command = [sys.executable, "-m", "onnxslim_llm", "compile", tiny, "-o", "build", "--verify", "off", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cost"]["peak_rss_bytes"] < len(ballast) / 2
