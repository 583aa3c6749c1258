"""Whose folder is this: telling our own output from a user's files before anything is replaced."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from onnxslim_llm.artifact.journal import JOURNAL_NAME, is_journal
from onnxslim_llm.artifact.manifest import MANIFEST_NAME, REPORT_NAME, TOOL_NAME

__all__ = ["foreign_files", "is_partial", "remove_folder"]

# They tell that a folder is ours, so they go last: a removal that is killed half way can then be finished later.
_MARKERS = (JOURNAL_NAME, MANIFEST_NAME)


def _files(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            yield os.path.relpath(os.path.join(root, name), folder)


def _listed(folder: Path) -> set[str] | None:
    """The files that the manifest in `folder` answers for; None if there is no manifest of ours."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        if manifest["tool"]["name"] != TOOL_NAME:
            return None
        artifact = manifest["artifact"]
        entries = [*artifact["files"], *artifact.get("carried", ())]
        return {MANIFEST_NAME, REPORT_NAME, *(str(Path(entry["path"])) for entry in entries)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def foreign_files(folder: Path) -> list[str]:
    """The files in `folder` that this compiler did not write, sorted: all of them if it holds no artifact of ours.

    Raises:
        OSError: The folder cannot be read.
    """
    listed = _listed(folder) or set()
    return sorted(name for name in _files(folder) if name not in listed)


def is_partial(folder: Path) -> bool:
    """Whether `folder` is what an interrupted compile leaves: a journal, an artifact, or nothing in it."""
    if is_journal(folder / JOURNAL_NAME) or _listed(folder) is not None:
        return True
    return next(_files(folder), None) is None


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours with all that is in it.

    Raises:
        OSError: Something in it cannot be removed.
    """
    for entry in list(os.scandir(folder)):
        if entry.name in _MARKERS:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    shutil.rmtree(folder)
