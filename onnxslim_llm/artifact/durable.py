"""Files that survive a power cut: what is renamed into place must be on the disk, not only in the system's cache."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

__all__ = ["BackgroundSync", "sync"]


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk.

    Raises:
        OSError: They cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BackgroundSync:
    """Writes large files out while the compile goes on, so that publishing need not wait for the disk."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync")
        self._started: dict[Path, Future[None]] = {}

    def start(self, path: Path) -> None:
        """Begin to write out a file that will not change any more."""
        self._started[path] = self._pool.submit(sync, path)

    def finish(self, folder: Path) -> None:
        """Wait until everything in `folder`, and its own entries, are on the disk.

        Raises:
            OSError: Something cannot be written.
        """
        for path in sorted(folder.iterdir()):
            if path.is_file() and path not in self._started:
                self.start(path)
        self.start(folder)
        for written in self._started.values():
            written.result()

    def close(self) -> None:
        """Forget what was not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)
