"""The command line as a user has it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import onnxslim_llm

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of a child that finds the package that this process tests, and that draws no colours."""
    home = str(Path(onnxslim_llm.__file__).resolve().parents[1])
    kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "COLUMNS")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}


@pytest.fixture
def cli(tmp_path: Path, environment: dict[str, str]) -> Run:
    """Run a command line in `tmp_path` and return what came out; more keywords as for subprocess.run."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        settings = {"cwd": tmp_path, "env": environment, "timeout": 120, "capture_output": True, "text": True}
        command = [sys.executable, "-m", "onnxslim_llm", *map(str, arguments)]
        return subprocess.run(command, **{**settings, **options})

    return run


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder of 0.1 M parameters with a KV cache."""
    path = tmp_path_factory.mktemp("decoder") / "tiny.onnx"
    script = ROOT / "benchmarks" / "reference_decoder.py"
    subprocess.run([sys.executable, script, path], check=True, capture_output=True)
    return path
