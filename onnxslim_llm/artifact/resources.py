"""The operating system's refusals (disk full, permission, out of memory) as errors that say what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from onnxslim_llm.errors import ResourceError

__all__ = ["as_resource_error", "resource_errors"]

#: What numpy says of a write that the disk had no room for: its error has no number.
_CUT_WRITE = re.compile(r"\d+ requested and \d+ written")
_FREE_SPACE = "free some space and run the same command again with --resume"
_TODO = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "raise the file size limit (ulimit -f) or choose another folder with -o, then use --resume",
    errno.EACCES: "check the permissions, or choose another folder with -o",
    errno.EPERM: "check the permissions, or choose another folder with -o",
    errno.EROFS: "choose a folder on a writable disk with -o",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter folder name with -o",
    errno.ENOTDIR: "choose another folder with -o: a part of this path is a file",
    errno.EIO: "check the disk, then run the same command again with --resume",
}


def as_resource_error(error: OSError | MemoryError, where: str = "") -> ResourceError:
    """Say a failed system call, or memory that ran out, as a ResourceError (exit code 5)."""
    if isinstance(error, MemoryError):
        return ResourceError(
            "out of memory", where=where, todo="use fewer --jobs or a lower --memory-limit, then --resume"
        )
    code = error.errno or (errno.ENOSPC if _CUT_WRITE.fullmatch(str(error)) else 0)
    reason = error.strerror or (os.strerror(code) if code else "") or str(error) or type(error).__name__
    return ResourceError(
        reason[:1].lower() + reason[1:],
        where=str(error.filename or where),
        todo=_TODO.get(code, "check that the file and its folder are there and can be used"),
    )


@contextmanager
def resource_errors(where: str = "") -> Iterator[None]:
    """Within the context an OSError or MemoryError becomes a ResourceError at `where`."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise as_resource_error(error, where) from error
