"""Measure models side by side: load time, prefill and decode speed, peak memory.

Every model runs in a process of its own. Rounds are interleaved (one measurement of each model in turn), so that a
machine that slows down or speeds up does so for all of them; medians are reported.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from onnxslim_llm.errors import GateError, ModelError, ResourceError, SlimError, UsageError

__all__ = ["BenchReport", "BenchResult", "bench", "stored_bytes"]

Progress = Callable[[int, int], None]

_ERRORS: dict[str, type[SlimError]] = {
    kind.__name__: kind for kind in (GateError, ModelError, ResourceError, UsageError)
}


@dataclass(frozen=True)
class BenchResult:
    """Figures of one model; medians over the rounds.

    Attributes:
        file_bytes: model and external data on disk.
        load_seconds: from file to ready session, each in a fresh process.
        prefill_tokens_per_second, decode_tokens_per_second: batch 1; None for a model that is no decoder.
        run_seconds: of one run, for a model that is no decoder.
        peak_rss_bytes: of the process that loaded the model and ran everything above; some 80 MB of it are Python and
            its libraries.
        samples: the single measurements by name, in seconds.
    """

    model: str
    file_bytes: int
    load_seconds: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    run_seconds: float | None
    peak_rss_bytes: int
    samples: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class BenchReport:
    """Results in the order of the models, and what they were measured with."""

    results: tuple[BenchResult, ...]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def bench(
    models: Sequence[str | Path],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 128,
    repeats: int = 5,
    threads: int | None = None,
    config: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure `models` on the same inputs.

    Args:
        models: .onnx files.
        prompt_tokens: length of the prompt for the prefill figure.
        new_tokens: single steps for the decode figure, after a prompt of as many tokens.
        repeats: rounds after one warm-up round; 5 or more for figures that are reported.
        threads: inside one operator; the number of usable cores by default. The same for all models.
        config: session config entries for all models.
        progress: called with (done, of how many) measurements.

    Raises:
        UsageError: no models, or numbers below 1.
        ModelError: a model cannot be opened or run.
        ResourceError: memory ran out, or a measuring process ended.
    """
    if not models or min(prompt_tokens, new_tokens, repeats) < 1:
        raise UsageError("bench needs at least one model, and tokens and repeats of at least 1")
    threads = threads or _usable_cores()
    plan = _Plan(prompt_tokens, new_tokens, repeats, len(models), progress)
    opening = {"threads": threads, "config": dict(config or {})}
    with ExitStack() as stack:
        workers: list[_Process] = []
        for model in models:
            workers.append(stack.enter_context(_Process(Path(model), opening)))
        loads = [[worker.ask("load")] for worker in workers]
        plan.tell(len(workers))
        samples: list[dict[str, list[float]]] = [{} for _ in workers]
        for round_number in range(repeats + 1):
            for worker, taken, load in zip(workers, samples, loads, strict=True):
                for verb, request in plan.requests(load[0]["decoder"]):
                    seconds = float(worker.ask(verb, **request)["seconds"])
                    if round_number:
                        taken.setdefault(verb, []).append(seconds)
                plan.tell(1)
        peaks = [int(worker.ask("memory")["bytes"]) for worker in workers]
    for _ in range(repeats - 1):
        for model, load in zip(models, loads, strict=True):
            with _Process(Path(model), opening) as fresh:
                load.append(fresh.ask("load"))
            plan.tell(1)
    results = tuple(
        _result(Path(model), plan, {"load": [float(x["seconds"]) for x in load], **taken}, peak)
        for model, load, taken, peak in zip(models, loads, samples, peaks, strict=True)
    )
    return BenchReport(results, prompt_tokens, new_tokens, repeats, threads)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Plan:
    def __init__(self, prompt: int, new: int, repeats: int, models: int, progress: Progress | None) -> None:
        self.prompt, self.new = prompt, new
        self._done, self._total = 0, models * (2 * repeats + 1)
        self._progress = progress

    def requests(self, decoder: bool) -> list[tuple[str, dict[str, int]]]:
        if not decoder:
            return [("run", {"length": self.prompt})]
        return [("prefill", {"tokens": self.prompt}), ("decode", {"prompt": self.new, "tokens": self.new})]

    def tell(self, steps: int) -> None:
        self._done += steps
        if self._progress:
            self._progress(self._done, self._total)


class _Process:
    """A measuring process that answers one request at a time."""

    def __init__(self, model: Path, opening: dict[str, Any]) -> None:
        self.model = model
        self._opening = opening
        self._process = subprocess.Popen(
            [sys.executable, "-m", "onnxslim_llm.runtime.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._process.wait()

    def ask(self, verb: str, **request: int) -> dict[str, Any]:
        """Send a request and wait for the answer; raises what the worker raised."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"verb": verb, "model": str(self.model), **self._opening, **request}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise ResourceError(
                f"the measuring process ended with status {code}",
                where=str(self.model),
                todo="free memory, or use fewer tokens",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _ERRORS.get(answer["error"], SlimError)(answer["what"], where=answer["where"], todo=answer["todo"])
        return answer


def _environment() -> dict[str, str]:
    """The child must find this package where this process found it, installed or not."""
    import onnxslim_llm

    root = str(Path(onnxslim_llm.__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _result(model: Path, plan: _Plan, samples: dict[str, list[float]], peak: int) -> BenchResult:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    prefill, decode = medians.get("prefill"), medians.get("decode")
    return BenchResult(
        model=str(model),
        file_bytes=stored_bytes(model),
        load_seconds=medians["load"],
        prefill_tokens_per_second=plan.prompt / prefill if prefill else None,
        decode_tokens_per_second=plan.new / decode if decode else None,
        run_seconds=medians.get("run"),
        peak_rss_bytes=peak,
        samples={name: tuple(values) for name, values in samples.items()},
    )


def stored_bytes(model: Path) -> int:
    """Size of the model file and of the external files that it names."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    names = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    return sum(file.stat().st_size for file in [model, *(model.parent / name for name in names)])
