"""SHA-256 of files, streamed, in background threads: OpenSSL releases the GIL, so hashing overlaps with the compile."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from onnxslim_llm.artifact.manifest import FileEntry

__all__ = ["BackgroundHasher", "file_sha256", "hash_files"]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hex; constant memory.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(root: Path, names: Iterable[str], only_sized: Iterable[str] = ()) -> list[FileEntry]:
    """Manifest entries (path relative to `root`, bytes, sha256) of the files `names`, then of `only_sized` unread."""
    hashed = [FileEntry(path=n, bytes=(root / n).stat().st_size, sha256=file_sha256(root / n)) for n in names]
    return [*hashed, *(FileEntry(path=n, bytes=(root / n).stat().st_size) for n in only_sized)]


class BackgroundHasher:
    """One thread that hashes files while the compile goes on; leaving the context drops what is not begun."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def submit(self, root: Path, names: Iterable[str], only_sized: Iterable[str] = ()) -> Future[list[FileEntry]]:
        """Start `hash_files`; its errors come with the result."""
        return self._pool.submit(hash_files, root, tuple(names), tuple(only_sized))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=kind is not None)
