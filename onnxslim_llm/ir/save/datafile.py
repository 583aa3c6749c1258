"""The external data file: preallocated, written anywhere by several threads, renamed into place when it is whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from onnxslim_llm.errors import ResourceError
from onnxslim_llm.ir.weights.mapping import MappedFile

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

__all__ = ["DataFile", "resource_errors", "sync_folder", "write_file"]

_COPY_BYTES = 1 << 20
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_NO_COPY_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
_DISK_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


class DataFile:
    """A file of known size under construction, at `path` with ".partial" appended.

    Args:
        path: Its final place.
        size: Bytes.
        keep: Go on with a partial file of this size if there is one, instead of starting with zeros.

    Attributes:
        kept: Whether there was one.

    Raises:
        ResourceError: The disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path, size: int, keep: bool = False) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.size = size
        self.kept = keep and self.partial.is_file() and self.partial.stat().st_size == size
        with resource_errors(self.path):
            flags = os.O_RDWR | os.O_CREAT | (0 if self.kept else os.O_TRUNC)
            self._descriptor = os.open(self.partial, flags | os.O_CLOEXEC, 0o666)
            try:
                self._reserve()
            except OSError:
                os.close(self._descriptor)
                if not self.kept:
                    self.partial.unlink(missing_ok=True)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def write(self, offset: int, data: Buffer) -> int:
        """Write bytes at `offset`; return their number.

        Raises:
            ResourceError: The disk is full, or the file cannot be written.
        """
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        done = 0
        with resource_errors(self.path):
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
        return done

    def copy(self, source: MappedFile, start: int, offset: int, length: int) -> None:
        """Copy `length` bytes of another file, from `start`, to `offset`; inside the kernel where it can.

        Raises:
            ResourceError: The disk is full, a file cannot be used, or the source has changed.
        """
        with source.open() as descriptor, resource_errors(self.path):
            done = _copy_in_kernel(descriptor, self._descriptor, start, offset, length)
            while done < length:
                piece = os.pread(descriptor, min(_COPY_BYTES, length - done), start + done)
                if not piece:
                    raise ResourceError("a weight file ends too early", where=str(source.path))
                done += self.write(offset + done, piece)

    def finish(self, sync: bool) -> None:
        """Put the file into its final place.

        Args:
            sync: Wait until it is on the disk.

        Raises:
            ResourceError: It cannot be renamed or flushed.
        """
        with resource_errors(self.path):
            if sync:
                os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            os.replace(self.partial, self.path)

    def discard(self) -> None:
        """Remove the partial file."""
        self.partial.unlink(missing_ok=True)

    def _reserve(self) -> None:
        # A full disk is better met now than after the work.
        if self.size == 0 or not hasattr(os, "posix_fallocate"):
            os.ftruncate(self._descriptor, self.size)
            return
        try:
            os.posix_fallocate(self._descriptor, 0, self.size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
            os.ftruncate(self._descriptor, self.size)


def write_file(path: Path, content: bytes, sync: bool) -> None:
    """Write a whole file so that `path` is the old one or the new one at every moment.

    Raises:
        ResourceError: The disk is full, or the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with resource_errors(path):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def resource_errors(path: Path) -> Iterator[None]:
    """Within the context, OSError and MemoryError become ResourceError."""
    try:
        yield
    except MemoryError as error:
        raise ResourceError(
            "out of memory", where=str(path), todo="use fewer jobs, or set a memory limit below what is free"
        ) from error
    except OSError as error:
        what = _DISK_FULL.get(error.errno or 0)
        todo = "free some space and run again" if what else "check folder, permissions and limits"
        reason = error.strerror or str(error)
        raise ResourceError(what or f"cannot write: {reason}", where=str(path), todo=todo) from error


def _copy_in_kernel(source: int, target: int, start: int, offset: int, length: int) -> int:
    """Copy what the kernel copies by itself; return how much that was."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(source, target, length - done, start + done, offset + done)
        except OSError as error:
            if error.errno in _NO_COPY_RANGE:
                return done
            raise
        if count == 0:
            return done
        done += count
    return done
