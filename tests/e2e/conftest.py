"""The command as a user has it, in a process of its own or in this one, and small models to feed it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import onnxslim_llm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from e2e_checks import Outcome
from e2e_models import decoder, save
from reference_decoder import DecoderSpec, write

Cli = Callable[..., Outcome]

_PATIENCE = 120.0  # seconds; a command that takes this long hangs


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of a child that finds the package that this process tests, and that draws no colours."""
    home = str(Path(onnxslim_llm.__file__).resolve().parents[1])
    kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "COLUMNS")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}


@pytest.fixture
def cli(tmp_path: Path, environment: dict[str, str]) -> Cli:
    """Run a command line in `tmp_path`, in its own process; more keywords as for subprocess.run."""

    def run(*arguments: object, **options: object) -> Outcome:
        settings = {"cwd": tmp_path, "env": environment, "timeout": _PATIENCE, "capture_output": True, "text": True}
        command = [sys.executable, "-m", "onnxslim_llm", *map(str, arguments)]
        done = subprocess.run(command, **{**settings, **options})
        return Outcome(done.returncode, done.stdout or "", done.stderr or "")

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line in `tmp_path`, in this process: the same way but for the start of Python."""
    from onnxslim_llm.cli.run import run as run_command_line

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run_command_line([str(argument) for argument in arguments])
        caught = capfd.readouterr()
        return Outcome(code, caught.out, caught.err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder of 0.1 M parameters with a KV cache, its weights inline. Tests must not change it."""
    return save(decoder(), tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder of 4 M parameters with external data: enough weights to be interrupted in the middle of them."""
    spec = DecoderSpec(vocab=2048, hidden=256, layers=4, heads=8, kv_heads=4, head_dim=32, ffn=768, tied="duplicate")
    return write(spec, tmp_path_factory.mktemp("wide") / "wide.onnx")
