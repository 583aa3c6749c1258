"""Progress is drawn where somebody looks, and nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


Terminal = Callable[..., tuple[int, str]]


@pytest.fixture
def on_a_terminal(tmp_path: Path, environment: dict[str, str]) -> Terminal:
    """Run with stderr on a pseudo-terminal; exit code and what was written there."""
    return partial(_run, tmp_path, environment)


def _run(cwd: Path, environment: dict[str, str], *arguments: str | Path) -> tuple[int, str]:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "onnxslim_llm", *map(str, arguments)]
    settings = {**environment, "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(command, cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        written = b""
        try:
            while piece := os.read(master, 65536):
                written += piece
        except OSError:  # Linux reports the closed other end as an input/output error
            pass
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(master)
    return process.returncode, written.decode()


def test_a_terminal_sees_stages_and_is_left_clean(decoder: Path, on_a_terminal: Terminal) -> None:
    code, text = on_a_terminal("compile", decoder, "-o", "build")
    assert code == 0, text
    assert all(stage in text for stage in ("passes", "verify"))
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is shown again
    assert "model files" in text


def test_quiet_draws_nothing_on_a_terminal(decoder: Path, on_a_terminal: Terminal) -> None:
    assert on_a_terminal("compile", decoder, "-o", "build", "-q", "--verify", "off") == (0, "")


def test_a_pipe_gets_no_control_characters(cli: Run, decoder: Path) -> None:
    done = cli("compile", decoder, "-o", "build")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
