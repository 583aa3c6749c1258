"""Every way a command ends: its exit code, and an error in three lines without a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import onnxslim_llm
from onnxslim_llm.cli.app import VERBS
from onnxslim_llm.cli.run import run
from onnxslim_llm.errors import GateError, ModelError, ResourceError, UsageError

Run = Callable[..., subprocess.CompletedProcess[str]]

HELP_SECONDS = 0.5  # a person does not notice this as waiting
TRIES = 5  # the best of these: other work on the machine is not the command's fault


def error_lines(text: str) -> dict[str, str]:
    """The parts of an error message: its first line, where, to do; anything else fails."""
    first, *rest = text.rstrip("\n").split("\n")
    assert first.startswith("error: ")
    parts = {"what": first.removeprefix("error: ")}
    assert len(rest) == 2, text
    for line in rest:
        label, _, value = line.strip().partition(": ")
        assert label in ("where", "to do"), text
        parts[label] = value
    assert all(parts.values()), text
    return parts


def test_help_lists_all_verbs_quickly(cli: Run) -> None:
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        done = cli("--help")
        times.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(verb in done.stdout for verb in VERBS)
    assert min(times) < HELP_SECONDS


def test_no_verb_imports_a_runtime_for_its_help() -> None:
    code = (
        "import sys; from onnxslim_llm.cli.run import run\n"
        f"for verb in {list(VERBS)}: assert run([verb, '--help']) == 0\n"
        "heavy = {'onnx', 'onnxruntime', 'numpy', 'onnx_graphsurgeon', 'pygal', 'jinja2', 'rich'}\n"
        "heavy &= sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    home = Path(onnxslim_llm.__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=home, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_common_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "-h"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--json", "-q, --quiet", "-v, --verbose"))


def test_compile_has_the_options_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    run(["compile", "--help"])
    text = capsys.readouterr().out
    options = "-o --target --recipe --set --calib --jobs --memory-limit --verify --resume --force --json -q -v"
    assert [option for option in options.split() if option not in text] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert onnxslim_llm.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "what", "todo"),
    [
        (["complie"], "no such command 'complie'", "did you mean 'compile'?"),
        (
            ["compile", "m.onnx", "--tarjet", "x"],
            "no such option",
            "did you mean '--target' or '--set' or",
        ),
        (["bench", "m.onnx", "--vs"], "option '--vs' requires an argument", "onnxslim-llm bench --help"),
        (["compile"], "missing argument 'MODEL'", "onnxslim-llm compile --help lists what there is"),
        (["compile", "m.onnx", "--jobs", "0"], "invalid value for '--jobs': 0 is not in the range x>=1", None),
        (
            ["compile", "m.onnx", "--memory-limit", "much"],
            "invalid value for '--memory-limit': 'much' is no size",
            None,
        ),
        (["compile", "m.onnx", "--verify", "maybe"], "invalid value for '--verify': 'maybe' is not one of", None),
        (["passes", "no_such_pass"], "unknown pass 'no_such_pass'", None),
        (["compile", "m.onnx", "-o", ""], "invalid value for '-o' / '--output': the path is empty", None),
        (["targets", "ort_cpu"], "unknown target 'ort_cpu'", "did you mean 'ort-cpu'"),
        (["inspect", "missing.onnx"], "no such file", None),
        (["generate", "missing", "--prompt", "x"], "no such file", None),
    ],
)
def test_usage_errors(
    arguments: list[str],
    what: str,
    todo: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    captured = capsys.readouterr()
    parts = error_lines(captured.err)
    assert parts["what"].startswith(what)
    assert parts["to do"].startswith(todo or "")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [
        (UsageError("u", where="w", todo="t"), 2, "u"),
        (ModelError("m", where="w", todo="t"), 3, "m"),
        (GateError("g", where="w", todo="t"), 4, "g"),
        (ResourceError("r", where="w", todo="t"), 5, "r"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk"), 5, "no space left on device"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/secret"), 5, "permission denied"),
        (MemoryError(), 5, "out of memory"),
        (ModelError("without more"), 3, "without more"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("unexpected\nsecond line"), 70, "this is a bug: ValueError: unexpected"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault is injected; what is tested is how it is told."""
    import onnxslim_llm.targets

    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(onnxslim_llm.targets, "get_target", fail)
    assert run(["targets", "any"]) == code
    text = capsys.readouterr().err
    assert text.startswith(f"error: {what}\n")
    if code != 130:
        error_lines(text)
    assert "Traceback" not in text
    if code == 70:
        assert "onnxslim_llm.cli.targets_verb:" in text
        assert "onnxslim-llm targets any -v" in text
        assert run(["targets", "any", "-v"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_a_bug_in_a_pass_names_the_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxslim_llm.targets

    class Broken:
        name = "fuse_everything"

        def apply(self) -> None:
            raise ZeroDivisionError("oops")

    monkeypatch.setattr(onnxslim_llm.targets, "get_target", lambda name: Broken().apply())
    assert run(["targets", "any"]) == 70
    assert "where: pass 'fuse_everything', " in capsys.readouterr().err


def test_an_interrupted_compile_points_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnxslim_llm import compiler

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "compile", interrupted)
    assert run(["compile", "m.onnx"]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "tables"])
def test_a_reader_that_leaves_is_no_error(cli: Run, options: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = cli("passes", *options, stdout=writing, stderr=subprocess.PIPE, capture_output=False)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


def test_an_interruption_of_code_made_from_text_ends_with_the_same_code(tmp_path: Path) -> None:
    """With `python -m`, CPython 3.11 ends the process by the signal if the interrupt came through `exec`."""
    script = """
import onnxslim_llm.cli.run as cli_run

def run(arguments):
    try:
        exec("raise KeyboardInterrupt")
    except KeyboardInterrupt:
        return cli_run.INTERRUPTED

cli_run.run = run
from onnxslim_llm.cli import main

main()
"""
    (tmp_path / "interrupted.py").write_text(script)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-m", "interrupted"], env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 130
