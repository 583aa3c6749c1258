"""Killed or interrupted at any moment: the old artifact or the new one, whole and loadable, and --resume goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e_checks import Outcome, model_bytes, noise, nothing_left, refused, session, whole
from e2e_models import mlp, save

Cli = Callable[..., Outcome]

OPTIONS = ["-o", "build", "--force", "--target", "ort-cpu", "--recipe", "int4-fast"]

_DEADLINE = 60.0  # seconds to wait for a process; one that takes longer hangs
_KILLS = 16


@contextmanager
def started(folder: Path, environment: dict[str, str], *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A compile that runs in `folder`; killed at the end of the context if it is still there."""
    command = [sys.executable, "-m", "onnxslim_llm", "compile", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def state(folder: Path) -> str:
    """Which artifact is in build/, after checking that it is whole and that ONNX Runtime opens it."""
    manifest = whole(folder / "build")
    session(folder / "build" / "model.onnx")
    return str(manifest["recipe"]["name"])


@pytest.mark.slow
def test_killed_at_random_moments(here: Cli, tmp_path: Path, wide: Path, environment: dict[str, str]) -> None:
    """With an old artifact in place: it or the new one is there after each kill, and the last run finishes the work.

    The moments are drawn from the time that a whole compile takes; every other run resumes what is left.
    """
    assert here("compile", wide, *OPTIONS[:2], "--recipe", "safe", "--verify", "off").code == 0
    old = model_bytes(tmp_path / "build")
    begin = time.monotonic()
    with started(tmp_path, environment, wide, "-o", "expected", *OPTIONS[2:], "--verify", "off") as process:
        assert process.wait(_DEADLINE) == 0
    whole_time = time.monotonic() - begin
    expected = model_bytes(tmp_path / "expected")
    draw = random.Random(1)
    seen = set()
    for attempt in range(_KILLS):
        resume = ["--resume"] if attempt % 2 else []
        with started(tmp_path, environment, wide, *OPTIONS, "--verify", "off", *resume) as process:
            time.sleep(draw.uniform(0.2, 1.0) * whole_time)
            process.send_signal(signal.SIGKILL)
            process.wait(_DEADLINE)
        found = state(tmp_path)
        seen.add(found)
        assert model_bytes(tmp_path / "build") == (old if found == "safe" else expected)
        if found != "safe":  # put the old one back, beside whatever else was left
            assert here("compile", wide, *OPTIONS[:3], "--recipe", "safe", "--verify", "off").code == 0
    assert "safe" in seen
    done = here("compile", wide, *OPTIONS, "--verify", "off", "--resume")
    assert done.code == 0, done.err
    assert state(tmp_path) == "int4-fast"
    assert model_bytes(tmp_path / "build") == expected
    nothing_left(tmp_path, "build", "expected")


STAGES = """
import os, signal, sys, threading, time
from onnxslim_llm.cli.run import run
from onnxslim_llm.ir.save import datafile

kind, after, arguments = getattr(signal, sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
written = 0
original = {name: getattr(datafile.DataFile, name) for name in ("write", "copy")}

def counting(name):
    def method(self, *args):
        global written
        result = original[name](self, *args)
        written += 1
        if written == after:
            os.kill(os.getpid(), kind)
            time.sleep(0.05)  # the signal is handled in the main thread, while this one is at work
        return result
    return method

for name in original:
    setattr(datafile.DataFile, name, counting(name))
sys.exit(run(arguments))
"""


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("after", [1, 6, 15])
def test_resumed_after_a_few_pieces_of_weights(
    here: Cli, tmp_path: Path, wide: Path, environment: dict[str, str], kind: str, after: int
) -> None:
    """Killed in the middle of the weights, where resuming saves work; the finished files are the same to the byte."""
    arguments = ["compile", str(wide), *OPTIONS, "--verify", "off"]
    done = subprocess.run(
        [sys.executable, "-c", STAGES, kind, str(after), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_DEADLINE,
    )
    if kind == "SIGKILL":
        assert done.returncode == -signal.SIGKILL, done.stderr
        nothing_left(tmp_path, ".build.lock", ".build.partial")
    else:
        refused(Outcome(done.returncode, done.stdout, done.stderr), 130, "interrupted", "--resume")
        nothing_left(tmp_path, ".build.partial")
    again = here(*arguments, "--resume")
    assert again.code == 0, again.err
    assert after == 1 or "resumed" in again.err
    nothing_left(tmp_path, "build")
    assert here("compile", wide, "-o", "expected", *OPTIONS[2:], "--verify", "off").code == 0
    assert model_bytes(tmp_path / "build") == model_bytes(tmp_path / "expected")
    resumed, fresh = whole(tmp_path / "build"), whole(tmp_path / "expected")
    assert len(fresh["layers"]) > 20
    assert resumed["layers"] == fresh["layers"]  # figures of work done before the interruption are reported, too


def test_resume_does_not_trust_work_of_another_kind(
    here: Cli, tmp_path: Path, wide: Path, environment: dict[str, str]
) -> None:
    arguments = ["compile", str(wide), *OPTIONS, "--verify", "off"]
    subprocess.run([sys.executable, "-c", STAGES, "SIGKILL", "12", *arguments], cwd=tmp_path, env=environment)
    other = [*arguments, "--resume", "--set", "quantize_weights.block=64"]
    done = here(*other)
    assert done.code == 0, done.err
    assert "starting over" in done.err
    assert here("compile", wide, "-o", "expected", *OPTIONS[2:], *other[-2:], "--verify", "off").code == 0
    assert model_bytes(tmp_path / "build") == model_bytes(tmp_path / "expected")


def test_resume_does_not_trust_work_on_a_changed_source(here: Cli, tmp_path: Path, environment: dict[str, str]) -> None:
    source = save(mlp(), tmp_path / "model.onnx")
    arguments = ["compile", "model.onnx", *OPTIONS, "--verify", "off"]
    subprocess.run([sys.executable, "-c", STAGES, "SIGKILL", "1", *arguments], cwd=tmp_path, env=environment)
    model = mlp()
    model.graph.initializer[0].raw_data = model.graph.initializer[1].raw_data
    save(model, source)
    assert here(*arguments, "--resume").code == 0
    assert noise(source, tmp_path / "build" / "model.onnx") < 0.2


def test_resume_without_anything_to_resume(here: Cli, tmp_path: Path, tiny: Path) -> None:
    done = here("compile", tiny, *OPTIONS, "--verify", "off", "--resume")
    assert done.code == 0, done.err
    assert "nothing to resume" in done.err
    whole(tmp_path / "build")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["open", "passes", "weights", "verify", "report"])
def test_ctrl_c_in_every_stage(tmp_path: Path, wide: Path, environment: dict[str, str], stage: str) -> None:
    """One line and its hint, exit code 130, and the same command with --resume comes to the end."""
    with started(tmp_path, environment, wide, *OPTIONS, "-v") as process:
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told += line
            if line.strip() == f"note: {stage}":
                break
        else:
            pytest.fail(f"stage '{stage}' was never told: {told}")
        os.kill(process.pid, signal.SIGINT)
        _, rest = process.communicate(timeout=_DEADLINE)
    if process.returncode != 0:  # the last stage may be over before the signal comes
        assert process.returncode == 130, rest
        lines = [line for line in rest.splitlines() if not line.startswith("note: ")]
        assert lines == ["error: interrupted", "  to do: the same command with --resume goes on where it stopped"]
        assert not (tmp_path / "build").exists()
        with started(tmp_path, environment, wide, *OPTIONS, "--resume", "--verify", "off") as process:
            assert process.wait(_DEADLINE) == 0
    assert state(tmp_path) == "int4-fast"
    nothing_left(tmp_path, "build")


def test_ctrl_c_leaves_the_old_artifact(here: Cli, tmp_path: Path, wide: Path, environment: dict[str, str]) -> None:
    assert here("compile", wide, *OPTIONS[:2], "--recipe", "safe", "--verify", "off").code == 0
    old = model_bytes(tmp_path / "build")
    subprocess.run(
        [sys.executable, "-c", STAGES, "SIGINT", "9", "compile", str(wide), *OPTIONS, "--verify", "off", "-q"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    assert state(tmp_path) == "safe"
    assert model_bytes(tmp_path / "build") == old


def test_a_broken_partial_folder_does_not_stop_the_next_compile(
    here: Cli, tmp_path: Path, wide: Path, environment: dict[str, str]
) -> None:
    """Whatever a crash of the machine made of the files that were in work."""
    arguments = ["compile", str(wide), *OPTIONS, "--verify", "off"]
    subprocess.run([sys.executable, "-c", STAGES, "SIGKILL", "12", *arguments], cwd=tmp_path, env=environment)
    partial = tmp_path / ".build.partial"
    for path in partial.iterdir():
        if path.name != ".journal":
            os.truncate(path, path.stat().st_size // 2)
    with (partial / ".journal").open("ab") as journal:
        journal.write(b'{"torn')
    done = here(*arguments, "--resume")
    assert done.code == 0, done.err
    assert here("compile", wide, "-o", "expected", *OPTIONS[2:], "--verify", "off").code == 0
    assert model_bytes(tmp_path / "build") == model_bytes(tmp_path / "expected")
