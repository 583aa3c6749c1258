"""Run a grid: compile each point, measure it, and keep what is known after every one."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx

from onnxslim_llm import __version__
from onnxslim_llm.artifact.environment import read_environment
from onnxslim_llm.artifact.hashing import file_sha256
from onnxslim_llm.artifact.journal import compile_identity
from onnxslim_llm.artifact.manifest import Tool, created_now
from onnxslim_llm.artifact.sweep_record import SweepPoint, SweepRecord, SweepSource, SweepText
from onnxslim_llm.compiler.calibration import SELF
from onnxslim_llm.compiler.defaults import default_recipe
from onnxslim_llm.compiler.flow import VerifyLevel, compile  # noqa: A004
from onnxslim_llm.compiler.progress import Progress, Silent
from onnxslim_llm.compiler.sweep.folder import SweepFolder
from onnxslim_llm.compiler.sweep.grid import Point, make_points, parse_axis
from onnxslim_llm.compiler.sweep.measuring import Ruler
from onnxslim_llm.errors import GateError, SlimError, UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.proto.external import resolve_model_path
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.pipeline import PassRecord
from onnxslim_llm.targets import get_target

__all__ = ["Keep", "SweepResult", "sweep"]

Keep = Literal["none", "pareto", "all"]


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        path: Its folder.
        record: What sweep.json holds; the points of this grid come first, in its order.
    """

    path: Path
    record: SweepRecord


def sweep(
    source: str | Path,
    out: str | Path,
    *,
    text: str | Path,
    recipes: Sequence[str | Path] = (),
    grid: Sequence[str] = (),
    settings: Sequence[str] = (),
    calib: str | Path | None = None,
    target: str = "portable",
    target_options: Mapping[str, str] | None = None,
    window: int = 512,
    max_tokens: int | None = 8192,
    bench_rounds: int = 3,
    verify: VerifyLevel = "off",
    keep: Keep = "none",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Compile every point of a grid and measure it against the source: bytes, perplexity, divergence, speed.

    Calibration statistics are collected once for all points. What is measured is written after every point, so that an
    interrupted sweep goes on when it is started again, and a larger grid in the same folder adds to what is there.
    Points that failed are tried again.

    Args:
        source: An .onnx file of a decoder, tokenizer beside it, or a folder with exactly one.
        out: The sweep's folder: sweep.json, sweep.csv, report.html, and a recipe that reproduces each point.
        text: UTF-8 text that the model has not seen.
        recipes: Presets or .toml files; default by the kind of model.
        grid: `PASS.OPTION=V1,V2,...`; each one multiplies the number of points.
        settings: `PASS.OPTION=VALUE` for all points.
        calib: As for `compile`.
        target: Name of the runtime that the artifacts are for.
        target_options: Options of the target's own.
        window: Tokens that a prediction can look back on.
        max_tokens: Measure on the beginning of the text; None: on all of it.
        bench_rounds: Rounds of the speed measurement; 0: none.
        verify: As for `compile`. By default nothing is refused: the figures say how good a point is.
        keep: Artifacts to keep: "none", those on the "pareto" front, or "all".
        jobs: Threads of each compile and measurement; default: all usable CPUs.
        progress: Told what happens.

    Raises:
        UsageError: Unknown pass, option, recipe or target, a value that is refused, text that cannot be read, a model
            that is no decoder, or a folder of something else.
        ModelError: The source is no valid or supported model.
        ResourceError: The folder cannot be written.
        SlimError: Of the first point, if there is none that did not fail.
    """
    if keep not in get_args(Keep):
        raise UsageError(f"'{keep}' artifacts cannot be kept", where="--keep-artifacts", todo="use none, pareto or all")
    progress = progress or Silent()
    axes = [parse_axis(given, "--grid") for given in grid]
    fixed = [parse_axis(given, "--set", single=True) for given in settings]
    path = resolve_model_path(source)
    goal = get_target(target).with_options(target_options or {})
    bases = [Recipe.load(name) for name in recipes] or [default_recipe(open_model(path), goal)[0]]
    points = make_points(bases, axes, fixed)
    progress.stage("open")
    ruler = Ruler.of(
        path, goal, Path(text), window=window, max_tokens=max_tokens, threads=jobs or 0, rounds=bench_rounds
    )
    options = {"target": target, "target_options": dict(target_options or {}), "calib": calib, "verify": verify}
    with SweepFolder(Path(out)) as folder:
        record = _record(ruler, Path(text), target, calib, jobs)
        keys = _keys(points, ruler, {**options, "calib": _data_identity(calib), "speed": bool(bench_rounds)})
        earlier = {point.key: point for point in folder.earlier(record)}
        run = _Run(folder, ruler, record, keep, jobs, progress, options)
        first = run.points(points, keys, earlier)
        if first is not None and not any(point.status == "ok" for point in record.points):
            raise first
        folder.discard_statistics()
        return SweepResult(folder.path, record)


@dataclass
class _Run:
    """The work of a sweep.

    Attributes:
        options: Of `compile`, the same for all points.
    """

    folder: SweepFolder
    ruler: Ruler
    record: SweepRecord
    keep: Keep
    jobs: int | None
    progress: Progress
    options: dict[str, Any]

    def points(self, points: Sequence[Point], keys: Sequence[str], earlier: dict[str, SweepPoint]) -> SlimError | None:
        """Measure all points; return the first error, if there was one."""
        first: SlimError | None = None
        places = {key: place for place, key in enumerate(keys)}
        self.record.points = list(earlier.values())
        self._write(places)
        for number, (point, key) in enumerate(zip(points, keys, strict=True), 1):
            known = earlier.get(key)
            told = f"{number} of {len(points)} {point.name}"
            if known is not None and self._suffices(known):
                done = known.model_copy(update={"base": point.base, "settings": point.settings})
                told += " (known)"
            else:
                done, error = self._measure(point, key, f"{number}/{len(points)}")
                first = first or error
            self.record.points = [p for p in self.record.points if p.key != key]
            self.record.points.append(done)
            self._write(places)
            self.progress.note(f"{told}: {_figures(done)}")
        return first

    def _suffices(self, known: SweepPoint) -> bool:
        """Return whether a point need not be measured again, be it for its artifact."""
        wanted = self.keep == "all" or (self.keep == "pareto" and known.pareto)
        return known.status == "ok" and not (wanted and known.artifact is None)

    def _write(self, places: Mapping[str, int]) -> None:
        self.record.points.sort(key=lambda p: places.get(p.key, len(places)))  # stable: older ones keep their order
        self.record.mark_front()
        if self.keep == "pareto":
            self.folder.drop_artifacts(p for p in self.record.points if not p.pareto)
        self.folder.write(self.record)

    def _measure(self, point: Point, key: str, number: str) -> tuple[SweepPoint, SlimError | None]:
        found = SweepPoint(name=point.name, key=key, base=point.base, settings=point.settings, status="failed")
        if point.recipe is None:
            found.reason = point.refusal
            return found, UsageError(point.refusal, where=point.name)
        found.recipe_file = self.folder.write_recipe(point.name, point.recipe)
        progress = _Numbered(self.progress, number)
        place = self.folder.work / point.name
        try:
            start = time.perf_counter()
            compile(
                self.ruler.source,
                place,
                recipe=point.recipe,
                jobs=self.jobs,
                statistics=self.folder.statistics,
                progress=progress,
                **self.options,
            )
            found.compile_seconds = time.perf_counter() - start
            self._figures(found, resolve_model_path(place), progress)
        except SlimError as error:
            found.reason = _one_line(error)
            return found, error
        finally:
            if self.keep == "none" or found.status == "failed":
                shutil.rmtree(place, ignore_errors=True)
        if self.keep != "none":
            found.artifact = self.folder.keep(point.name, place)
        return found, None

    def _figures(self, found: SweepPoint, artifact: Path, progress: Progress) -> None:
        size = self.ruler.bytes(artifact)
        progress.stage("evaluate", len(self.ruler.tokens), "tokens")
        figures = self.ruler.quality(artifact, lambda done, _: progress.advance(done))
        progress.stage("measure")
        speeds, why = self.ruler.speed(artifact)
        figures |= {**speeds, "bytes": size, "bytes_ratio": size / self.record.source.bytes}
        for name, value in figures.items():
            setattr(found, name, value)
        found.status, found.reason = "ok", why


class _Numbered:
    """Hands progress on, with the point's number before the name of each stage."""

    def __init__(self, progress: Progress, number: str) -> None:
        self._progress, self._number = progress, number

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self._progress.stage(f"{self._number} {name}", total, unit)

    def advance(self, done: int, label: str = "") -> None:
        self._progress.advance(done, label)

    def pass_finished(self, record: PassRecord) -> None:
        self._progress.pass_finished(record)

    def note(self, text: str) -> None:
        self._progress.note(text)


def _record(ruler: Ruler, text: Path, target: str, calib: str | Path | None, jobs: int | None) -> SweepRecord:
    source = SweepSource(path=str(ruler.source), sha256=file_sha256(ruler.source), bytes=ruler.bytes(ruler.source))
    measured = SweepText(path=str(text), tokens=len(ruler.tokens), token_sha256=ruler.token_sha256, window=ruler.window)
    return SweepRecord(
        tool=Tool(version=__version__),
        created=created_now(),
        source=source,
        target=target,
        text=measured,
        calibration=None if calib is None else str(calib),
        environment=read_environment(jobs),
    )


def _keys(points: Sequence[Point], ruler: Ruler, options: Mapping[str, Any]) -> list[str]:
    """Return what each point's figures depend on, as a hash: model, recipe, options, text and version."""
    proto = onnx.load(ruler.source, load_external_data=False)
    names = {entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"}
    data = [ruler.source.parent / name for name in sorted(names)]
    same = {**options, "version": __version__, "text": ruler.token_sha256, "window": ruler.window}
    return [
        compile_identity(
            ruler.source, data, {**same, "recipe": point.name if point.recipe is None else point.recipe.resolved()}
        )
        for point in points
    ]


def _data_identity(calib: str | Path | None) -> Any:
    """Return what stands for the content of calibration data."""
    if calib is None or str(calib) == SELF:
        return calib if calib is None else SELF
    path = Path(calib)
    if not path.exists():
        raise UsageError("there is no such calibration file", where=str(path), todo="check the path after --calib")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()


def _figures(point: SweepPoint) -> str:
    if point.status == "failed":
        return f"failed: {point.reason}"
    speed = "" if point.decode_ratio is None else f", decode {point.decode_ratio:.2f}x"
    return f"{point.bytes_ratio:.3f}x bytes, KL {point.kld_mean:.4g}, perplexity {point.ppl_ratio:.4f}x{speed}"


def _one_line(error: SlimError) -> str:
    manifest = getattr(error, "manifest", None) if isinstance(error, GateError) else None
    text = error.what if manifest is None else error.what.removesuffix("; nothing was published")
    return f"{text} ({error.where})" if error.where and manifest is None else text
