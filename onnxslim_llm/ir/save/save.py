"""Saving: the layout first, then the weights on a bounded pool of threads into the data file, the graph last.

The bytes do not depend on the number of jobs. Memory follows the tiles in flight, not the model: inputs are mapped, and
their pages are dropped as tiles finish.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Literal, Protocol, runtime_checkable

from google.protobuf.message import EncodeError
from onnx import TensorProto
from threadpoolctl import threadpool_limits

from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.ir.model import INLINE_LIMIT, Model
from onnxslim_llm.ir.proto.writer import inline_store
from onnxslim_llm.ir.save.datafile import DataFile, resource_errors, sync_folder, write_file
from onnxslim_llm.ir.save.layout import Layout, plan_layout
from onnxslim_llm.ir.save.work import Unit, plan_work
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.jobs import DerivedWeight
from onnxslim_llm.ir.weights.weight import Weight

__all__ = ["DetailJournal", "Journal", "SaveOptions", "SaveReport", "save_model", "save_models"]


class Journal(Protocol):
    """Remembers finished work between runs; called from the saving thread only."""

    def done(self, key: str) -> bool:
        """Whether the work of `key` was marked."""

    def mark(self, key: str) -> None:
        """Remember that the bytes of this work are in the partial data file."""


@runtime_checkable
class DetailJournal(Journal, Protocol):
    """A journal that also keeps the statistics of jobs, so that the report of a resumed save is complete."""

    def note(self, key: str, detail: dict[str, Any]) -> None:
        """Remember statistics; called before `mark(key)`."""

    def detail(self, key: str) -> dict[str, Any] | None:
        """Return what was noted."""


@dataclass(frozen=True)
class SaveOptions:
    """How to save.

    Attributes:
        jobs: Threads.
        memory_limit: Most bytes that the pieces in flight may take together; None: no limit but `jobs` pieces.
        external: Weights in a data file beside the model: always, never, or when it is worth it (see `plan_layout`).
        fsync: Return only when the files are on the disk, not just in the system's cache.
    """

    jobs: int = 1
    memory_limit: int | None = None
    external: Literal["auto"] | bool = "auto"
    fsync: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageError(f"{self.jobs} jobs cannot save anything", where="jobs", todo="use 1 or more")


@dataclass
class SaveReport:
    """What a save did.

    Attributes:
        files: The model files first, then the data file if there is one.
        bytes: Their size together.
        weights: Statistics of the weight jobs by weight name, as the jobs' `finish` returned them. A second job of the
            same name gets " (2)" behind it.
        bytes_read: Bytes of stored weights that were read in this run.
        bytes_written: Bytes that were written in this run.
        layout: Digest of the layout of the data file.
        resumed: Names of weights that an earlier run had finished.
    """

    files: list[Path] = field(default_factory=list)
    bytes: int = 0
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    layout: str = ""
    resumed: list[str] = field(default_factory=list)


def save_model(
    model: Model,
    path: str | Path,
    options: SaveOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    journal: Journal | None = None,
) -> SaveReport:
    """Write a model to `path`, and its large weights to `path` with ".data" appended.

    Each file is written under a temporary name ("....partial") and renamed when it is whole: first the data, then the
    model. A model may be saved over the files that it was opened from.

    Args:
        model: Stays as it is.
        path: The .onnx file to write; its folder must exist.
        options: Default: one thread.
        progress: Called in this thread with (bytes done, bytes in all) of the data file.
        journal: Makes the save resumable: the partial data file is kept on failure, and work that the journal has
            marked is not done again if it is still the same work.

    Raises:
        ModelError: A weight is unusable (its job says so), or the weights do not fit into one file.
        ResourceError: The disk is full, files cannot be written, or one tile alone exceeds the memory limit.
    """
    return save_models({Path(path): model}, options, progress, journal)


def save_models(
    models: Mapping[Path, Model],
    options: SaveOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    journal: Journal | None = None,
) -> SaveReport:
    """Write several models of one folder, whose weights lie in one data file: equal ones are stored once.

    Args:
        models: By the file to write; the data file is called like the first, with ".data" appended.
        options: As for `save_model`.
        progress: Likewise.
        journal: Likewise.

    Returns:
        The report of all together: the files of the models, then the data file.

    Raises:
        ModelError: As for `save_model`.
        ResourceError: Likewise.
    """
    path, options = next(iter(models)), options or SaveOptions()
    layout = plan_layout(list(models.values()), options.external)
    report = SaveReport(layout=layout.digest)
    data_path = path.with_name(path.name + ".data")
    units: list[Unit] = []
    if layout.size:
        units = plan_work(layout)
        _check_memory(units, options.memory_limit)
        _write_data(data_path, layout, units, options, progress, journal, report)
    kept = {key: data for unit in units for key, data in unit.kept.items()}
    report.bytes = layout.size
    for file, model in models.items():
        content = _graph_bytes(model, layout, data_path.name, kept)
        _add_inline_figures(model, report)
        write_file(file, content, options.fsync)
        report.bytes_written += len(content)
        report.bytes += len(content)
    report.files = [*models, data_path] if layout.size else [*models]
    if options.fsync:
        with resource_errors(path):
            sync_folder(path.parent)
    return report


def _write_data(
    path: Path,
    layout: Layout,
    units: list[Unit],
    options: SaveOptions,
    progress: Callable[[int, int], None] | None,
    journal: Journal | None,
    report: SaveReport,
) -> None:
    keys = {} if journal is None else {id(unit): unit.key(report.layout) for unit in units}
    names = _unique_names(units)
    partial = path.with_name(path.name + ".partial")
    finished = journal is not None and all(journal.done(key) for key in keys.values())
    if finished and not partial.exists() and path.is_file():
        # The earlier run was stopped after the data file was complete.
        path.rename(partial)
    done_before: list[Unit] = []
    if journal is not None:
        done_before = [unit for unit in units if not unit.kept and journal.done(keys[id(unit)])]
    # A partial file of another layout would leave its bytes in the gaps.
    with DataFile(path, layout.size, keep=bool(done_before)) as file:
        if not file.kept:
            done_before = []
        report.resumed = [names[id(unit)] for unit in done_before]
        for unit in done_before:
            detail = journal.detail(keys[id(unit)]) if isinstance(journal, DetailJournal) else None
            if detail is not None:
                report.weights[names[id(unit)]] = detail
        skip = {id(unit) for unit in done_before}

        def completed(unit: Unit) -> None:
            stats = unit.finish()
            report.bytes_read += unit.bytes_read
            if stats is not None:
                report.weights[names[id(unit)]] = stats
            if journal is not None:
                if stats is not None and isinstance(journal, DetailJournal):
                    journal.note(keys[id(unit)], stats)
                journal.mark(keys[id(unit)])

        try:
            pending = [unit for unit in units if id(unit) not in skip]
            _run(pending, file, options, layout.size, progress, completed, report)
            file.finish(options.fsync)
        except BaseException:
            if journal is None:
                file.discard()
            raise
    order = {name: place for place, name in enumerate(names.values())}
    report.weights = dict(sorted(report.weights.items(), key=lambda item: order[item[0]]))


def _add_inline_figures(model: Model, report: SaveReport) -> None:
    """Report on the jobs whose outputs went into the model file, where no unit of work stands for them."""
    for constant in model.constants():
        weight = weight_of(constant).storage
        if isinstance(weight, DerivedWeight) and weight.job.figures is not None:
            report.weights.setdefault(weight.job.where(), weight.job.figures)


def _unique_names(units: list[Unit]) -> dict[int, str]:
    count: Counter[str] = Counter()
    names = {}
    for unit in units:
        count[unit.name] += 1
        names[id(unit)] = unit.name if count[unit.name] == 1 else f"{unit.name} ({count[unit.name]})"
    return names


def _run(
    units: list[Unit],
    file: DataFile,
    options: SaveOptions,
    total: int,
    progress: Callable[[int, int], None] | None,
    completed: Callable[[Unit], None],
    report: SaveReport,
) -> None:
    """Run all pieces of all units, at most `jobs` at a time and within the memory limit."""
    waiting = deque((unit, index) for unit in units for index in range(len(unit.pieces)))
    left = {id(unit): len(unit.pieces) for unit in units}
    for unit in units:
        if not unit.pieces:
            completed(unit)
    running: dict[Future[int], tuple[Unit, int]] = {}
    memory = 0
    # Alignment gaps and resumed work count as done.
    done = total - sum(region.nbytes for unit in units for region in unit.regions)
    limit = options.memory_limit
    stop = Event()
    pool = ThreadPoolExecutor(max_workers=options.jobs, thread_name_prefix="save")
    one_each = threadpool_limits(limits=1, user_api="blas")  # matrix products would take all cores for every piece
    try:
        if progress is not None:
            progress(done, total)
        while waiting or running:
            while waiting and len(running) < options.jobs:
                unit, index = waiting[0]
                needed = unit.pieces[index]
                if running and limit is not None and memory + needed > limit:
                    break
                waiting.popleft()
                memory += needed
                running[pool.submit(unit.run, index, file, stop)] = (unit, needed)
            ready, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ready:
                unit, needed = running.pop(future)
                memory -= needed
                count = future.result()
                done += count
                report.bytes_written += count
                left[id(unit)] -= 1
                if left[id(unit)] == 0:
                    completed(unit)
            if progress is not None:
                progress(done, total)
    except MemoryError as error:
        raise ResourceError("out of memory", where=str(file.path), todo="use fewer jobs") from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        one_each.restore_original_limits()


def _check_memory(units: list[Unit], limit: int | None) -> None:
    for unit in units:
        largest = max(unit.pieces, default=0)
        if limit is not None and largest > limit:
            raise ResourceError(
                f"one piece of work needs {largest} bytes, the memory limit is {limit}",
                where=f"weight '{unit.name}'",
                todo="raise the memory limit",
            )


def _graph_bytes(model: Model, layout: Layout, location: str, kept: dict[Hashable, bytes]) -> bytes:
    inline = 0

    def store(out: TensorProto, weight: Weight) -> None:
        region = layout.regions.get(weight.storage_key)
        if region is None:
            if weight.storage_key in kept:
                out.raw_data = kept[weight.storage_key]
            else:
                inline_store(out, weight)
            return
        out.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", region.offset), ("length", region.nbytes)):
            out.external_data.add(key=key, value=str(value))

    for constant in model.constants():
        weight = weight_of(constant)
        if weight.storage_key not in layout.regions:
            inline += weight.nbytes
    if inline > INLINE_LIMIT:
        raise ModelError(
            f"{inline} bytes of weights do not fit into the model file (2 GiB)",
            where=str(model.path or ""),
            todo="save with external data",
        )
    try:
        return bytes(model.write(store).SerializeToString(deterministic=True))
    except (EncodeError, ValueError) as error:
        raise ModelError(f"the model cannot be serialized: {error}", where=str(model.path or "")) from error
