"""Run the calibration data through a model, part by part, and add up what enters its products."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.stats.calibration import Calibration
from onnxslim_llm.stats.carry import Carry
from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.refused import values_of
from onnxslim_llm.stats.segments import Segment, extract, plan_segments
from onnxslim_llm.stats.statistics import Statistics
from onnxslim_llm.stats.taps import Tap, find_taps

__all__ = ["GRAM_LIMIT", "HELD_OUT_OF", "Progress", "collect"]

Progress = Callable[[int, int], None]

#: Bytes of H matrices held at a time.
GRAM_LIMIT = 512 << 20
#: One sample of so many is held out of what weights are fitted to.
HELD_OUT_OF = 5
#: Part of the key: raise it when the same model and data give other numbers.
_VERSION = 1


def collect(
    model: Path,
    model_digest: str,
    data: Calibration,
    folder: Path,
    *,
    limit: int = GRAM_LIMIT,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[Statistics, list[str]]:
    """Collect the moments of every distinct input of a product, or take them from `folder`.

    The model runs in consecutive segments. What one hands on to the next lies on disk, so that the memory needed does
    not grow with the number of samples. An interrupted collection goes on after the last finished segment.

    Args:
        model: The .onnx file, external data beside it.
        model_digest: Identifies its content.
        data: The calibration inputs.
        folder: Where statistics are kept; made if it does not exist.
        limit: Bytes of H matrices held at a time.
        threads: For ONNX Runtime; 0 leaves the choice to it.
        progress: Called with (done, of how many) samples, all segments together.

    Returns:
        The statistics, and notes: taps that saw fewer rows than their K.

    Raises:
        ModelError: The model does not run on the data, or a tensor has NaN or infinite values; it is named.
    """
    key = hashlib.sha256(f"statistics v{_VERSION} {model_digest} {data.digest}".encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    statistics = Statistics(folder, key)
    statistics.resume()
    proto = onnx.load(model, load_external_data=False)
    taps = find_taps(proto.graph)
    segments = [] if all(map(statistics.has, taps)) else plan_segments(proto.graph, taps, limit)
    carry = Carry(folder / "carried", len(data))
    run = _Run(proto, model, data, statistics, carry, threads, progress or _silent, len(segments))
    for number, segment in enumerate(segments):
        run.segment(number, segment)
    carry.clear()
    return statistics, [note for tap in statistics.taps for note in _notes(tap, statistics)]


def _silent(done: int, total: int) -> None:
    pass


@dataclass
class _Run:
    proto: onnx.ModelProto
    path: Path
    data: Calibration
    statistics: Statistics
    carry: Carry
    threads: int
    progress: Progress
    segments: int

    def segment(self, number: int, segment: Segment) -> None:
        """Run one segment over all samples, unless it is done already."""
        known = all(self.statistics.has(tap) for tap in segment.taps)
        total = self.segments * len(self.data)
        if known and (not segment.carried_out or self.carry.complete(number)):
            self.progress((number + 1) * len(self.data), total)
            return
        fit, held = ({tap.tensor: Moments(tap.size) for tap in segment.taps} for _ in range(2))
        session: Session | None = None
        for sample, given in enumerate(self.data.feeds()):
            available = {**given, **(self.carry.load(number - 1, sample, segment.carried_in) if number else {})}
            if session is None and segment.stop > segment.start:
                types = {name: _element(available[name]) for name in segment.carried_in}
                part = extract(self.proto, segment, types)
                session = open_session(part, threads=self.threads, base_dir=self.path.parent)
            if session is not None:
                available |= session.run({info.name: available[info.name] for info in session.inputs})
            for tensor, sums in (held if sample % HELD_OUT_OF == 1 else fit).items():
                with values_of(tensor):
                    sums.add(available[tensor])
            if segment.carried_out:
                self.carry.store(number, sample, {name: available[name] for name in segment.carried_out})
            self.progress(number * len(self.data) + sample + 1, total)
        for tap in segment.taps:
            if not self.statistics.has(tap):
                self.statistics.put(tap, fit[tap.tensor], held[tap.tensor])
        if number:
            self.carry.drop(number - 1)


def _element(array: NDArray[np.generic]) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _notes(tap: Tap, statistics: Statistics) -> list[str]:
    stored = statistics.of_tensor(tap.tensor)
    if stored is None:
        return []
    where = f"'{tap.tensor}' (before {', '.join(tap.weights[:3])})"
    with np.load(stored.file) as arrays:  # reads this one member
        silent = not arrays["fit_square"].any()
    if silent:
        return [f"{where}: zero on all calibration data, so the weights after it are chosen without them"]
    if stored.count < stored.size:
        few = f"only {stored.count} calibration tokens for K = {stored.size}: its second moments are not of full rank"
        return [f"{where}: {few}"]
    return []
