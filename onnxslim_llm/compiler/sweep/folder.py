"""The folder of a sweep: what is in it is whole at any time, and a later sweep goes on from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from onnxslim_llm import __version__
from onnxslim_llm.artifact.lock import FileLock
from onnxslim_llm.artifact.manifest import REPORT_NAME
from onnxslim_llm.artifact.sweep_record import SWEEP_NAME, SweepPoint, SweepRecord, read_sweep, sweep_csv
from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.recipe import Recipe

__all__ = ["SweepFolder"]

_CSV, _RECIPES, _ARTIFACTS = "sweep.csv", "recipes", "artifacts"
_LOCK, _WORK, _STATISTICS = ".lock", ".work", ".statistics"


class SweepFolder:
    """sweep.json, sweep.csv, report.html, recipes/ and artifacts/ of one model measured on one text.

    Used as a context; the lock is held inside.

    Args:
        path: The folder; made if it does not exist.

    Raises:
        UsageError: It holds other files, or another process is at work in it.
        ResourceError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / _LOCK)

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            others = [p.name for p in self.path.iterdir() if p.name not in (_LOCK, _WORK, _STATISTICS)]
            if others and SWEEP_NAME not in others:
                raise UsageError(
                    f"the folder holds '{min(others)}' and no sweep", where=str(self.path), todo="choose another folder"
                )
            if not self._lock.acquire():
                raise UsageError("another sweep is at work in this folder", where=str(self.path))
            shutil.rmtree(self.work, ignore_errors=True)  # of one that was killed
        except OSError as error:
            raise ResourceError(f"the folder cannot be used: {error.strerror}", where=str(self.path)) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self._lock.release()

    @property
    def work(self) -> Path:
        """Where artifacts are made."""
        return self.path / _WORK

    @property
    def statistics(self) -> Path:
        """Where calibration statistics lie while points may need them."""
        return self.path / _STATISTICS

    def earlier(self, record: SweepRecord) -> list[SweepPoint]:
        """Return what an earlier sweep of the same model and text has measured with this version.

        Raises:
            UsageError: The folder holds a sweep of something else.
        """
        file = self.path / SWEEP_NAME
        if not file.is_file():
            return []
        todo = "choose another folder, or remove this one"
        try:
            found = read_sweep(file)
        except ModelError as error:
            raise UsageError(error.what, where=error.where, todo=todo) from error
        for what, theirs, ours in (
            ("model", found.source.sha256, record.source.sha256),
            ("target", found.target, record.target),
            ("text", (found.text.token_sha256, found.text.window), (record.text.token_sha256, record.text.window)),
        ):
            if theirs != ours:
                raise UsageError(f"the folder holds a sweep of another {what}", where=str(file), todo=todo)
        return found.points if found.tool.version == __version__ else []

    def write(self, record: SweepRecord) -> None:
        """Write the three files, each whole or not at all.

        Raises:
            ResourceError: They cannot be written.
        """
        from onnxslim_llm.report.sweep_page import render_sweep  # the plots' library loads slowly

        self._replace(SWEEP_NAME, record.dumps())
        self._replace(_CSV, sweep_csv(record))
        self._replace(REPORT_NAME, render_sweep(record))

    def write_recipe(self, name: str, recipe: Recipe) -> str:
        """Write the recipe of a point; return the file's path in the folder."""
        (self.path / _RECIPES).mkdir(exist_ok=True)
        file = f"{_RECIPES}/{name}.toml"
        self._replace(file, recipe.to_toml())
        return file

    def keep(self, name: str, artifact: Path) -> str:
        """Move an artifact into the folder; return its path there."""
        place = f"{_ARTIFACTS}/{name}"
        (self.path / _ARTIFACTS).mkdir(exist_ok=True)
        shutil.rmtree(self.path / place, ignore_errors=True)
        os.replace(artifact, self.path / place)
        return place

    def drop_artifacts(self, points: Iterable[SweepPoint]) -> None:
        """Remove the artifacts of points."""
        for point in points:
            if point.artifact is not None:
                shutil.rmtree(self.path / point.artifact, ignore_errors=True)
                point.artifact = None

    def discard_statistics(self) -> None:
        """Remove the calibration statistics: all points are done."""
        shutil.rmtree(self.statistics, ignore_errors=True)

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{Path(name).name}.part"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path / name)
        except OSError as error:
            raise ResourceError(f"'{name}' cannot be written: {error.strerror}", where=str(self.path)) from error
