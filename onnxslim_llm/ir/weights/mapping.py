"""Read-only memory maps of weight files."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np

from onnxslim_llm.errors import ResourceError

__all__ = ["MappedFile"]

_PAGE = mmap.PAGESIZE


class MappedFile:
    """A file that weights point into. It is mapped at the first read and stays mapped as long as someone looks at it.

    Args:
        path: An existing regular file. It must not shrink while it is mapped.

    Attributes:
        path: The file.
        size: Bytes at the time of opening.
        identity: (device, inode, size, mtime in ns): equal identities mean the same content.

    Raises:
        OSError: The file cannot be examined.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))  # the working directory may change
        status = os.stat(path)
        self.size = status.st_size
        self.identity = _identity(status)
        self._map: mmap.mmap | None = None
        self._lock = Lock()

    def read(self, offset: int, length: int) -> np.ndarray:
        """Return bytes [offset, offset + length) as a read-only uint8 array over the mapped pages.

        Raises:
            ResourceError: The file has gone, has changed, or may not be read.
        """
        if length == 0:
            return np.empty(0, np.uint8)
        mapped = self._mapped()
        # A page that the file has lost ends the process with a bus error: look before each reading.
        self._check(self.path)
        return np.frombuffer(mapped, np.uint8, count=length, offset=offset)

    def release(self, offset: int, length: int) -> None:
        """Drop the pages of [offset, offset + length) from resident memory; reading them again faults them in."""
        mapped = self._map
        if mapped is None or length <= 0 or not hasattr(mapped, "madvise"):
            return
        start = offset // _PAGE * _PAGE
        stop = min(offset + length, len(mapped))
        if stop > start:
            mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)

    @contextmanager
    def open(self) -> Iterator[int]:
        """Give a descriptor of the file for reading, while the context lasts.

        Raises:
            ResourceError: The file has gone, may not be read, or is another one now.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ResourceError(
                f"cannot read a weight file: {error.strerror}",
                where=str(self.path),
                todo="check that the file is there and readable",
            ) from error
        try:
            self._check(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _check(self, place: Path | int) -> None:
        try:
            same = _identity(os.stat(place)) == self.identity
        except OSError:
            same = False
        if not same:
            raise ResourceError(
                "a weight file has changed since the model was opened",
                where=str(self.path),
                todo="do not change the model's files during a compile",
            )

    def _mapped(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                with self.open() as descriptor:
                    self._map = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
            return self._map


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
