"""Building an output folder beside its final place and publishing it in one step.

    with Staging(out, source=model, force=force) as staging:   # refuses what must be refused, before any work
        staging.begin(identity, resume=resume)                 # staging.directory and staging.journal exist from here
        ...                                                    # write the files, the manifest last
        staging.publish()

For DIR = a/b the work happens in a/.b.partial under the lock a/.b.lock. Killed at any moment, DIR is the old folder or
the new one (or absent, if there was none before). Where the file system cannot swap two folders, the old one is
a/.b.old for an instant, and the next start puts it back if the new one did not arrive.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from onnxslim_llm.artifact.durable import BackgroundSync, sync
from onnxslim_llm.artifact.exchange import exchange
from onnxslim_llm.artifact.folder import foreign_files, is_partial, remove_folder
from onnxslim_llm.artifact.journal import JOURNAL_NAME, Journal
from onnxslim_llm.artifact.lock import FileLock
from onnxslim_llm.artifact.manifest import MANIFEST_NAME, Manifest
from onnxslim_llm.artifact.resources import as_resource_error, resource_errors
from onnxslim_llm.errors import CompilerBug, ResourceError, UsageError

__all__ = ["Staging"]

_NO_LOCKS_HERE = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
_SHOWN_FOREIGN_FILES = 3


class Staging:
    """The folder under construction for `out`; a context manager.

    Leaving the context by an interruption or a lack of resources keeps the partial folder for --resume; leaving it by
    any other error removes it. OSError and MemoryError leave as ResourceError.

    Args:
        out: The final folder (DIR).
        source: The model's file or folder; DIR may not contain it, since replacing DIR would lose it.
        force: Replace DIR if it is an artifact of ours or empty.
    """

    def __init__(self, out: Path, *, source: Path | None = None, force: bool = False) -> None:
        self.out = out.resolve()
        beside = self.out.parent  # with_name() would refuse the root folder before we can say why
        self.directory = beside / f".{self.out.name}.partial"
        self.notes: list[str] = []
        """What happened on the way that a user should know: recovered, discarded or resumed work."""
        self._old = beside / f".{self.out.name}.old"
        self._failed = beside / f"{self.out.name}.failed.json"
        self._lock = FileLock(beside / f".{self.out.name}.lock")
        self._source = source.resolve() if source else None
        self._force = force
        self._journal: Journal | None = None
        self._sync = BackgroundSync()
        self._made_parents: list[Path] = []
        self._published = False

    @property
    def journal(self) -> Journal:
        """The journal of this compile, from `begin` to `publish`."""
        if self._journal is None:
            raise CompilerBug("the journal is used outside of begin() ... publish()", where=str(self.out))
        return self._journal

    def __enter__(self) -> Self:
        with resource_errors(str(self.out)):
            self._check_name()
            self._make_parents()
            try:
                self._take_lock()
                self._recover()
                self._check_existing()
            except BaseException:
                self._leave()
                raise
        return self

    def begin(self, identity: str, *, resume: bool = False) -> None:
        """Make the partial folder, or take up an interrupted one.

        Args:
            identity: `compile_identity` of this compile.
            resume: Go on from an interrupted compile of the same identity; any other is discarded.

        Raises:
            UsageError: The partial folder's name is taken by files that are not ours.
            ResourceError: It cannot be made.
        """
        with resource_errors(str(self.directory)):
            if self.directory.exists():
                self._settle_partial(identity, resume)
            elif resume:
                self.notes.append("nothing to resume: the compile starts from the beginning")
            self.directory.mkdir(exist_ok=True)
            self._journal = Journal(self.directory / JOURNAL_NAME, identity, resume=resume)
            if self._journal.resumed:
                self.notes.append(f"resumed: {len(self._journal)} pieces of work were done already")

    def written(self, path: Path) -> None:
        """Say that a large file is complete: it goes to the disk in the background."""
        self._sync.start(path)

    def publish(self) -> Path:
        """Make the partial folder DIR, in one step; the final path.

        Raises:
            CompilerBug: There is no manifest in it.
            ResourceError: The rename was refused.
        """
        if not (self.directory / MANIFEST_NAME).is_file():
            raise CompilerBug("an artifact without a manifest must not be published", where=str(self.directory))
        with resource_errors(str(self.out)):
            self.journal.close()
            (self.directory / JOURNAL_NAME).unlink()
            self._sync.finish(self.directory)
            if not self.out.exists():
                os.rename(self.directory, self.out)
            elif exchange(self.directory, self.out):
                self._discard(self.directory)
            else:
                self._replace_by_two_renames()
        self._published = True
        self._forget_failure()
        with suppress(OSError):  # some file systems cannot sync a folder; the artifact is in place
            sync(self.out.parent)
        return self.out

    def reject(self, manifest: Manifest) -> Path:
        """Write the manifest of an artifact that failed a gate to DIR.failed.json; DIR itself stays as it was.

        Raises:
            ResourceError: It cannot be written.
        """
        with resource_errors(str(self._failed)):
            beside = self._failed.with_name(f".{self._failed.name}.partial")
            manifest.write(beside)
            os.replace(beside, self._failed)
        return self._failed

    def keep_log(self, text: str) -> Path:
        """Write what a vendor's tool printed before it failed to DIR.failed.log, beside where the manifest would be.

        Raises:
            ResourceError: It cannot be written.
        """
        path = self._failed.with_suffix(".log")
        with resource_errors(str(path)):
            path.write_text(text, encoding="utf-8")
        return path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._journal is not None:
            self._journal.close()
        resumable = isinstance(error, KeyboardInterrupt | ResourceError | OSError | MemoryError)
        self._sync.close()
        begun = self._journal is not None  # before that, a folder of this name is not ours to remove
        if begun and not self._published and not resumable:
            self._discard(self.directory)
        self._leave()
        if isinstance(error, OSError | MemoryError):
            raise as_resource_error(error, str(self.directory)) from error
        if begun and isinstance(error, ResourceError) and "--resume" not in error.todo:
            error.todo = "; ".join(filter(None, [error.todo, "the same command with --resume goes on"]))

    def _check_name(self) -> None:
        if not self.out.name:
            raise UsageError("the root folder cannot be the output", where=str(self.out), todo="choose another with -o")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError("the output is a file, not a folder", where=str(self.out), todo="choose another with -o")
        if self._source and self._source.is_relative_to(self.out) and self.out.exists() and self._force:
            raise UsageError(
                "the output folder holds the model that is to be compiled",
                where=str(self.out),
                todo="choose another folder with -o: --force would remove the source",
            )

    def _make_parents(self) -> None:
        missing = [path for path in self.out.parents if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made_parents.append(path)

    def _take_lock(self) -> None:
        try:
            held = self._lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            self.notes.append("this file system has no locks: do not compile to the same folder twice at once")
            return
        if not held:
            raise ResourceError(
                "another compile is writing this folder",
                where=str(self.out),
                todo="wait until it is done, or choose another folder with -o",
            )

    def _recover(self) -> None:
        """Finish what an earlier run left between its two renames."""
        if not self._old.exists() or not is_partial(self._old):
            return
        if self.out.exists():
            self._discard(self._old)
        else:
            os.rename(self._old, self.out)
            self.notes.append("an interrupted replacement was undone: the previous artifact is back")

    def _check_existing(self) -> None:
        if not self.out.exists():
            return
        if not self._force:
            raise UsageError(
                "the output folder exists", where=str(self.out), todo="replace it with --force, or choose -o"
            )
        foreign = foreign_files(self.out)
        if foreign:
            raise UsageError(
                f"the output folder holds files that are not from {_shown(foreign)}",
                where=str(self.out),
                todo="move them away or choose another folder with -o: --force replaces only its own artifacts",
            )

    def _settle_partial(self, identity: str, resume: bool) -> None:
        if not is_partial(self.directory):
            raise UsageError(
                "the working folder's name is taken by other files",
                where=str(self.directory),
                todo="move that folder away, or choose another output with -o",
            )
        if not resume:
            remove_folder(self.directory)
            return
        probe = Journal(self.directory / JOURNAL_NAME, identity, resume=True)
        probe.close()
        if not probe.resumed:
            self.notes.append("the interrupted compile was of another model, recipe or version: starting over")
            remove_folder(self.directory)

    def _replace_by_two_renames(self) -> None:
        os.rename(self.out, self._old)
        try:
            os.rename(self.directory, self.out)
        except OSError:
            os.rename(self._old, self.out)
            raise
        self._discard(self._old)

    def _discard(self, folder: Path) -> None:
        try:
            if folder.exists():
                remove_folder(folder)
        except OSError as error:
            self.notes.append(f"could not remove {folder}: {error.strerror}")

    def _forget_failure(self) -> None:
        with suppress(OSError):
            self._failed.unlink(missing_ok=True)
            self._failed.with_suffix(".log").unlink(missing_ok=True)

    def _leave(self) -> None:
        with suppress(OSError):
            self._lock.release()
        for path in reversed(self._made_parents):  # empty if nothing was published and nothing is kept
            with suppress(OSError):
                path.rmdir()


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN_FOREIGN_FILES} more" if len(listed) > _SHOWN_FOREIGN_FILES else ""
    return f"this compiler: {', '.join(listed[:_SHOWN_FOREIGN_FILES])}{more}"
