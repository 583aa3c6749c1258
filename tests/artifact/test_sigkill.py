"""SIGKILL before every single file operation of a compile: the old artifact or the new one, never a half, never none.

A child process installs an audit hook that counts the operations (open, rename, unlink, mkdir, the renameat2 call, ...)
and kills itself for good before the n-th; n runs from 0 until a child comes to its end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from killed_child import killed_before

from onnxslim_llm.artifact import staging as staging_module
from onnxslim_llm.artifact.hashing import file_sha256
from onnxslim_llm.artifact.manifest import Manifest, read_manifest
from onnxslim_llm.artifact.staging import Staging

Fill = Callable[[Path, int], Manifest]

_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "fcntl.flock"}
_OPERATIONS.add("ctypes.call_function")
_LIMIT = 1000  # far more operations than a publication has

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def whole_version(out: Path) -> int:
    """The version of the artifact at `out`, after checking that each file is the one its manifest tells."""
    manifest = read_manifest(out)
    for entry in manifest.artifact.files:
        assert file_sha256(out / entry.path) == entry.sha256
    assert not (out / ".journal").exists()
    return int(manifest.recipe["version"])


def compile_to(out: Path, fill: Fill, version: int, *, resume: bool = False) -> None:
    with Staging(out, force=True) as staging:
        staging.begin(f"work {version}", resume=resume)
        fill(staging.directory, version)
        staging.journal.mark("weights")
        staging.publish()


def interrupt(out: Path, fill: Fill, version: int) -> None:
    """Leave the partial folder of an interrupted compile."""
    with suppress(KeyboardInterrupt), Staging(out, force=True) as staging:
        staging.begin(f"work {version}")
        fill(staging.directory, version)
        raise KeyboardInterrupt


@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("resume", [True, False], ids=["resume", "restart"])
@pytest.mark.parametrize("before", ["none", "artifact", "interrupted"])
def test_the_old_or_the_new_artifact(
    tmp_path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch, swap: bool, resume: bool, before: str
) -> None:
    if not swap:
        monkeypatch.setattr(staging_module, "exchange", lambda first, second: False)
    seen: set[str] = set()
    for operation in range(_LIMIT):
        folder = tmp_path / str(operation)
        out = folder / "out"
        folder.mkdir()
        if before != "none":
            compile_to(out, fill, 1)
        if before == "interrupted":
            interrupt(out, fill, 2)
        died = killed_before(operation, partial(compile_to, out, fill, 2, resume=resume), _OPERATIONS)

        if out.exists():
            seen.add(f"version {whole_version(out)}")
        elif before == "none":
            seen.add("none")
        else:  # between the two renames: the old one is whole and the next start puts it back
            assert whole_version(folder / ".out.old") == 1
            assert not swap
            seen.add("aside")
            with Staging(out, force=True) as staging:
                assert "previous artifact is back" in staging.notes[0]
            assert whole_version(out) == 1

        compile_to(out, fill, 2, resume=resume)  # whatever was left behind, the next compile comes through
        assert whole_version(out) == 2
        assert os.listdir(folder) == ["out"]
        if not died:
            break
    else:
        pytest.fail("the compile never ends")
    expected = {"version 2", "none" if before == "none" else "version 1"}
    assert seen == (expected if swap or before == "none" else expected | {"aside"})
