"""Other people's compilers and converters, in processes of their own: they may hang or crash without us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "answer", "run_bounded"]

_LAST_LINES = 40
#: Where a child writes its answer: stdout belongs to what the libraries print.
_ANSWER = "ONNXSLIM_LLM_ANSWER"
#: No child may look at a model hub.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        answer: What it answered; None if it did not come so far.
        ended: "finished", "timed out after 60 s", "killed by signal SIGSEGV" or "exit code 3".
        log: All that it printed.
    """

    answer: Any
    ended: str
    log: str

    @property
    def finished(self) -> bool:
        """Whether it answered and ended well."""
        return self.ended == "finished" and self.answer is not None

    def tail(self, lines: int = _LAST_LINES) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.strip().splitlines()[-lines:])


def run_bounded(
    module: str, request: Mapping[str, Any], *, seconds: float, python: str = "", environment: Mapping[str, str] = {}
) -> Outcome:
    """Run `python -m module REQUEST` and return its answer.

    Args:
        module: Its `main` reads the request, JSON, from the only argument, and answers with `answer`.
        request: Anything that JSON holds.
        seconds: Time limit; the child and its children are killed after it.
        python: Another interpreter, of a virtual environment with other packages; default: this one. Of this
            environment it sees nothing but this package, wherever that is installed.
        environment: Further variables.
    """
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
        reply, log = Path(folder, "answer.json"), Path(folder, "log")
        path = _only_us(Path(folder)) if python else _search_path()
        variables = {**os.environ, **_OFFLINE, **environment, _ANSWER: str(reply), "PYTHONPATH": path}
        with log.open("wb") as sink:
            child = subprocess.Popen(
                [python or sys.executable, "-m", module, json.dumps(request)],
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=variables,
                cwd=folder,
                start_new_session=True,  # so that its children end with it
            )
            try:
                code = child.wait(seconds)
                ended = _ending(code)
            except subprocess.TimeoutExpired:
                ended = f"timed out after {seconds:g} s"
            finally:
                _kill_group(child)
        text = log.read_text(encoding="utf-8", errors="replace")
        return Outcome(json.loads(reply.read_text()) if reply.is_file() else None, ended, text)


def answer(value: Any) -> None:
    """Give the answer; for the child."""
    path = Path(os.environ[_ANSWER])
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(value))
    partial.rename(path)


def _ending(code: int) -> str:
    if code == 0:
        return "finished"
    return f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _search_path() -> str:
    """The child must find this very package, also in a checkout that is not installed."""
    here = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))


def _only_us(folder: Path) -> str:
    """Another environment must not find the packages that lie beside this one."""
    package = Path(__file__).resolve().parent
    alone = folder / "package"
    alone.mkdir()
    (alone / package.name).symlink_to(package, target_is_directory=True)
    return str(alone)
