"""Times of products with few-bit weights in the target's own runtime, on this machine.

A form is timed as a model of several products side by side, each with a weight of its own, in the operators that the
target's lowering makes of them. A run reads as many bytes as a token of the whole model does, up to `WORKING_BYTES`, so
that the weights of small models come from the caches that they come from in decoding. With larger ones, runs of other
forms come between two runs of one, and push its weights out of the caches.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onnxslim_llm.artifact.environment import cpu_name, package_version
from onnxslim_llm.compiler.product_models import INPUT, lowered_products, single_rows
from onnxslim_llm.compiler.progress import Progress, Silent
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.targets import Target
from onnxslim_llm.targets.product_times import ProductForm, TimeTable

__all__ = ["RuntimeTimer"]

#: Bytes of weights that one run reads, at most; a single weight may be larger.
WORKING_BYTES = 32 << 20
#: Bytes of weights in sessions that are open at a time, which take about twice as much memory.
_OPEN_BYTES = 256 << 20
#: Weights that one run reads: several, so that the time of the run itself, which is subtracted, is little of it.
_MOST_COPIES, _LEAST_COPIES = 128, 4
#: Single weights with more bytes take long enough.
_LARGE_WEIGHT = 4 << 20
#: Rows of tables that are only looked up in: a look-up reads one of them, however many there are.
_TABLE_ROWS = 4096
#: Every form is timed in so many rounds at least, and in more as long as all forms together take less than the seconds.
_ROUNDS, _MOST_ROUNDS = 5, 40
_SECONDS = 20.0
#: Look-ups take about as long as the noise of what is subtracted.
_SMALLEST_SHARE = 0.1
#: Runs in a row where weights stay in caches, after one that is not timed.
_RUNS = 3
#: As ONNX Runtime comes, with threads that spin; but not beyond a run, since many sessions are open.
_DEPLOYED = {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"}


@dataclass
class RuntimeTimer:
    """Times forms when they are first asked for.

    Attributes:
        target: Whose operators and runtime.
        threads: Of the runtime.
        progress: Told about the forms.
    """

    target: Target
    threads: int = 0
    progress: Progress = field(default_factory=Silent)
    _seconds: dict[tuple[ProductForm, bool], float] = field(default_factory=dict, repr=False)
    _empty: dict[int, float] = field(default_factory=dict, repr=False)
    _spreads: list[float] = field(default_factory=list, repr=False)

    def measure(self, forms: Collection[ProductForm], elements: int) -> TimeTable:
        """Return the times of the forms, see `ProductTimer.measure`.

        A time is that of the fastest run: what else the machine does only ever adds to it.
        """
        self._check()
        wanted = sorted(set(forms))
        missing = [form for form in wanted if (form, _is_large(form, elements)) not in self._seconds]
        if missing:
            self.progress.stage("time products", len(missing), "forms")
        done = 0
        for batch in _batches(missing, elements):
            seconds = _SECONDS * len(batch) / len(missing)
            self._measure(batch, elements, seconds)
            done += len(batch)
            self.progress.advance(done)
        found = {form: self._seconds[form, _is_large(form, elements)] for form in wanted}
        package = self.target.package
        return TimeTable(
            target=self.target.name,
            processor=cpu_name(),
            runtime=f"{package} {package_version(package)}",
            threads=self.threads,
            spread=statistics.median(self._spreads) if self._spreads else 1.0,
            seconds=found,
        )

    def _check(self) -> None:
        todo = "use target_bits, or another target"
        if self.target.simulated:
            what = f"target '{self.target.name}' is only simulated here: its times say nothing about the device"
            raise UsageError(what, where="target_ms", todo=todo)
        there, missing = self.target.installed()
        if not there:
            what = f"products cannot be timed for target '{self.target.name}': {missing}"
            raise UsageError(what, where="target_ms", todo=todo)

    def _measure(self, batch: Sequence[ProductForm], elements: int, seconds: float) -> None:
        with tempfile.TemporaryDirectory(prefix="time-") as folder:
            copies = [_copies(form, elements) for form in batch]
            runs = [
                self._prepared(self._products(form, count), form, count, Path(folder) / str(i))
                for i, (form, count) in enumerate(zip(batch, copies, strict=True))
            ]
            samples: list[list[float]] = [[] for _ in batch]
            end = time.perf_counter() + seconds
            for number in range(_MOST_ROUNDS):
                if number >= _ROUNDS and time.perf_counter() > end:
                    break
                for form, run, found in zip(batch, runs, samples, strict=True):
                    found.extend(_sample(run, large=_is_large(form, elements)))
        for form, count, found in zip(batch, copies, samples, strict=True):
            products = max(min(found) - self._empty_run(form, count), _SMALLEST_SHARE * min(found))
            self._seconds[form, _is_large(form, elements)] = products / count
            self._spreads.append(statistics.median(found) / min(found))

    def _products(self, form: ProductForm, copies: int) -> Model:
        return lowered_products(replace(form, columns=_columns(form)), copies, self.target)

    def _empty_run(self, form: ProductForm, copies: int) -> float:
        """Return the seconds of a run without products."""
        if copies not in self._empty:
            with tempfile.TemporaryDirectory(prefix="time-") as folder:
                run = self._prepared(single_rows(form, copies), form, copies, Path(folder) / "empty")
                self._empty[copies] = min(s for _ in range(_MOST_ROUNDS) for s in _sample(run, large=False))
        return self._empty[copies]

    def _prepared(self, model: Model, form: ProductForm, copies: int, folder: Path) -> Callable[[], object]:
        """Return what runs the model once."""
        folder.mkdir()
        path = folder / "model.onnx"
        save_model(model, path, SaveOptions(jobs=max(1, self.threads)))
        target = replace(self.target, session_config={**self.target.session_config, **_DEPLOYED})
        session = target.open(path, threads=self.threads)
        rows = np.random.default_rng(0).standard_normal((copies, form.rows)).astype(form.computes_in)
        fed = {info.name: rows if info.name == INPUT else np.zeros(1, np.int64) for info in session.inputs}
        values = {name: session.value(array) for name, array in fed.items()}
        last = [session.outputs[-1].name]  # the others are computed, too, but need not be handed out
        return lambda: session.run_values(values, last)


def _sample(run: Callable[[], object], *, large: bool) -> Iterator[float]:
    """Yield the seconds of one run, or of several in a row."""
    if not large:
        run()
    for _ in range(1 if large else _RUNS):
        start = time.perf_counter()
        run()
        yield time.perf_counter() - start


def _batches(forms: Sequence[ProductForm], elements: int) -> Iterator[list[ProductForm]]:
    """Yield forms that are timed in turns: of one shape, as long as their weights fit."""
    batch: list[ProductForm] = []
    used = 0
    for form in forms:
        size = _copies(form, elements) * _nbytes(form)
        if batch and used + size > _OPEN_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(form)
        used += size
    if batch:
        yield batch


def _copies(form: ProductForm, elements: int) -> int:
    """Return how many weights are read in a run."""
    working = min(WORKING_BYTES, elements * form.bits // 8)
    least = _LEAST_COPIES if _nbytes(form) < _LARGE_WEIGHT else 1
    return min(_MOST_COPIES, max(least, round(working / _nbytes(form))))


def _nbytes(form: ProductForm) -> int:
    return max(1, form.rows * _columns(form) * form.bits // 8)


def _columns(form: ProductForm) -> int:
    return min(form.columns, _TABLE_ROWS) if form.read_as == "look_up" else form.columns


def _is_large(form: ProductForm, elements: int) -> bool:
    """Whether the weights of a token are more than are read in one run."""
    return elements * form.bits // 8 > WORKING_BYTES
