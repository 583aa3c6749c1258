"""The journal of a compile: which weight jobs are already in the partial folder, so that --resume goes on from there.

Lines are appended with one write each, so a killed process leaves whole lines and at most one torn last line, which is
cut off. The page cache outlives the process but not the machine; instead of a disk flush per job (which would wait for
the weights themselves) the header holds the boot id, and a journal from before a reboot is not believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxslim_llm.artifact.hashing import file_sha256

__all__ = ["JOURNAL_NAME", "Journal", "compile_identity", "is_journal"]

JOURNAL_NAME = ".journal"
_FORMAT = "onnxslim-llm journal 1"
_HEADER_START = json.dumps({"format": _FORMAT})[:-1].encode()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def compile_identity(model: Path, data: Sequence[Path], options: Mapping[str, Any]) -> str:
    """What a journal is valid for: the same source and the same work.

    Args:
        model: The .onnx file; its content is hashed.
        data: Its external data files; path, size and time of change stand for their content.
        options: Everything that decides the bytes of the artifact: tool version, target, resolved recipe. JSON values.

    Raises:
        OSError: A file is missing.
    """
    files = [(str(path.resolve()), state.st_size, state.st_mtime_ns) for path in data for state in (path.stat(),)]
    text = json.dumps([file_sha256(model), str(model.resolve()), files, options], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_journal(path: Path) -> bool:
    """Whether the file at `path` is one of our journals, of whatever identity; a header torn at birth counts."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_HEADER_START))
    except OSError:
        return False
    return _HEADER_START.startswith(start)


class Journal:
    """Done keys of one compile. Thread-safe; a key is any text.

    Args:
        path: The journal's file.
        identity: `compile_identity` of this compile.
        resume: Believe an existing journal of the same identity; otherwise start empty.
    """

    def __init__(self, path: Path, identity: str, *, resume: bool = False) -> None:
        header = {"format": _FORMAT, "identity": identity, "boot": _boot_id()}
        self.path = path
        self._lock = threading.Lock()
        self._done: set[str] = set()
        self._details: dict[str, dict[str, Any]] = {}
        length = self._read(header) if resume else 0
        self.resumed = length > 0
        """Whether work of an earlier run is kept."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._descriptor, length)
        if not self.resumed:
            self._append(header)

    def done(self, key: str) -> bool:
        """Whether the work of `key` is in the partial folder already."""
        return key in self._done

    def mark(self, key: str) -> None:
        """Record `key`; call it when the bytes of that work have been written."""
        with self._lock:
            if key not in self._done:
                self._append(key)
                self._done.add(key)

    def note(self, key: str, detail: Mapping[str, Any]) -> None:
        """Record figures of the work of `key` (JSON values), before `mark(key)`: a resumed compile reports them too."""
        with self._lock:
            self._append({"note": key, "detail": dict(detail)})
            self._details[key] = dict(detail)

    def detail(self, key: str) -> dict[str, Any] | None:
        """What was noted of `key`."""
        return self._details.get(key)

    def __len__(self) -> int:
        return len(self._done)

    def close(self) -> None:
        """Close the file; it stays where it is."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, entry: object) -> None:
        line = (json.dumps(entry) + "\n").encode()
        written = os.write(self._descriptor, line)
        if written != len(line):  # a disk that fills up takes a part; the next start cuts the torn line off
            os.write(self._descriptor, line[written:])

    def _read(self, header: Mapping[str, str]) -> int:
        """Load the done keys if the header is ours; the length in bytes of the whole lines, 0 if it is not."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        whole = content[: content.rfind(b"\n") + 1]
        try:
            first, *entries = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            return 0
        if first != dict(header):
            return 0
        self._done.update(entry for entry in entries if isinstance(entry, str))
        self._details.update((entry["note"], entry["detail"]) for entry in entries if isinstance(entry, dict))
        return len(whole)
