"""Interrupted while statistics are made: the model's own text, its moments, the gains."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_checks import Outcome, model_bytes, nothing_left, refused, whole

Cli = Callable[..., Outcome]

_DEADLINE = 120.0  # seconds to wait for a process; one that takes longer hangs

#: Runs the command line, with few tokens of own text, up to the n-th word of progress in a stage.
UP_TO = """
import os, signal, sys, time
from onnxslim_llm.cli.progress import TerminalProgress
from onnxslim_llm.cli.run import run
from onnxslim_llm.compiler import calibration, own_text

kind, wanted, after, arguments = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
own_text.FEWEST_TOKENS = own_text.MOST_TOKENS = 512
calibration.OWN_WINDOW = 16
current, seen = "", 0
stage, advance = TerminalProgress.stage, TerminalProgress.advance

def told_stage(self, name, *rest):
    global current, seen
    current, seen = name, 0
    stage(self, name, *rest)

def told_advance(self, *rest):
    global seen
    seen += current == wanted
    advance(self, *rest)
    if current == wanted and seen == after:
        os.kill(os.getpid(), getattr(signal, kind))
        time.sleep(0.05)

TerminalProgress.stage, TerminalProgress.advance = told_stage, told_advance
sys.exit(run(arguments))
"""

WRITES = "calibrate: the model writes"


@pytest.fixture
def up_to(tmp_path: Path, environment: dict[str, str]) -> Callable[..., Outcome]:
    """Run a command line up to a point, in `tmp_path`; to its end if there is no such stage."""

    def start(kind: str, stage: str, after: int, *arguments: object) -> Outcome:
        command = [sys.executable, "-c", UP_TO, kind, stage, str(after), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=_DEADLINE, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return start


@pytest.mark.parametrize(
    ("kind", "stage", "after"),
    [
        ("SIGINT", WRITES, 5),
        pytest.param("SIGKILL", WRITES, 5, marks=pytest.mark.slow),
        pytest.param("SIGINT", "calibrate: statistics", 3, marks=pytest.mark.slow),
        pytest.param("SIGKILL", "calibrate: gains", 4, marks=pytest.mark.slow),
    ],
)
def test_interrupted_before_there_are_statistics(
    tmp_path: Path, tiny: Path, up_to: Callable[..., Outcome], kind: str, stage: str, after: int
) -> None:
    arguments = ["compile", tiny, "--recipe", "int4", "--verify", "off", "-o"]
    died = up_to(kind, stage, after, *arguments, "build")
    if kind == "SIGKILL":
        assert died.code == -signal.SIGKILL, died.err
        nothing_left(tmp_path, ".build.lock", ".build.partial")
    else:
        refused(died, 130, "interrupted", "--resume")
        nothing_left(tmp_path, ".build.partial")
    written = list((tmp_path / ".build.partial" / "statistics").glob("written-*.npy"))
    assert bool(written) == (stage != WRITES)
    again = up_to("SIGKILL", WRITES if written else "", 1, *arguments, "build", "--resume")  # what is written stays
    assert again.code == 0, again.err
    nothing_left(tmp_path, "build")
    assert up_to("SIGKILL", "", 0, *arguments, "expected").code == 0
    assert model_bytes(tmp_path / "build") == model_bytes(tmp_path / "expected")
    assert any("the model wrote itself" in note for note in whole(tmp_path / "build")["notes"])
