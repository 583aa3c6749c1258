"""The work of a save: copies, streams and jobs, cut into pieces that may run in any order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from threading import Event, Lock
from typing import Any

import numpy as np

from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.ir.save.datafile import DataFile
from onnxslim_llm.ir.save.layout import Layout, Region, work_identity
from onnxslim_llm.ir.weights.jobs import DerivedWeight, Tile, WeightJob
from onnxslim_llm.ir.weights.stored import MappedWeight
from onnxslim_llm.ir.weights.weight import CHUNK_BYTES

__all__ = ["Cancelled", "Unit", "plan_work"]

_COPY_PIECE = 64 << 20  # bytes; a copy in the kernel can only be interrupted between pieces
_COPY_MEMORY = 1 << 20


class Cancelled(Exception):  # noqa: N818  # no error: the save is being stopped
    """Another piece failed, or the user interrupted."""


class Unit(ABC):
    """Work that belongs together: it is done when all its pieces are.

    Attributes:
        regions: What it fills.
        pieces: Bytes of memory that each piece needs.
    """

    def __init__(self, regions: Sequence[Region], pieces: Sequence[int]) -> None:
        self.regions = list(regions)
        self.pieces = list(pieces)

    @property
    def name(self) -> str:
        """The weight, for messages."""
        return self.regions[0].name

    @property
    def bytes_read(self) -> int:
        """Bytes of stored weights that the unit reads."""
        return sum(region.nbytes for region in self.regions)

    def key(self, layout: str) -> str:
        """Return the name of this work in a journal: the same in another run only if it writes the same bytes."""
        text = "\n".join([layout, *(f"{region.offset} {work_identity(region.weight)}" for region in self.regions)])
        return hashlib.sha256(text.encode()).hexdigest()

    @abstractmethod
    def run(self, index: int, file: DataFile, stop: Event) -> int:
        """Do piece `index`; return the bytes written. Runs on any thread."""

    def finish(self) -> dict[str, Any] | None:
        """Return the statistics when all pieces are done; None if there are none."""
        return None

    @property
    def kept(self) -> dict[Hashable, bytes]:
        """Content that belongs into the model file, by storage key; a unit that has some cannot be skipped."""
        return {}


class _Copy(Unit):
    """Bytes of a file, unchanged."""

    def __init__(self, region: Region, weight: MappedWeight) -> None:
        count = max(1, -(-region.nbytes // _COPY_PIECE))
        super().__init__([region], [_COPY_MEMORY] * count)
        self._weight = weight

    def run(self, index: int, file: DataFile, stop: Event) -> int:
        region, start = self.regions[0], index * _COPY_PIECE
        length = min(_COPY_PIECE, region.nbytes - start)
        file.copy(self._weight.file, self._weight.offset + start, region.offset + start, length)
        return length


class _Stream(Unit):
    """Content that is made or read piece by piece, in order: arrays, protos, transposed views."""

    def __init__(self, region: Region) -> None:
        super().__init__([region], [2 * min(CHUNK_BYTES, region.nbytes)])

    def run(self, index: int, file: DataFile, stop: Event) -> int:
        region, done = self.regions[0], 0
        for start, data in region.weight.chunks():
            if stop.is_set():
                raise Cancelled
            count = file.write(region.offset + start, data)
            region.weight.release(start, start + count)
            done += count
        if done != region.nbytes:
            raise CompilerBug(f"a weight gave {done} bytes instead of {region.nbytes}", where=region.name)
        return done


class _Job(Unit):
    """All tiles of a weight job. Small outputs are kept for the model file; those that nobody uses are dropped."""

    def __init__(self, job: WeightJob, outputs: dict[int, Region], small: set[int]) -> None:
        self.job = job
        self._outputs = outputs
        self._tiles: Sequence[Tile] = job.tiles()
        whole = sum(weight.nbytes for weight in job.inputs) + sum(spec.nbytes for spec in job.outputs)
        share = -(-whole // max(1, len(self._tiles)))
        super().__init__(list(outputs.values()), [tile.nbytes or share for tile in self._tiles])
        self._stats: list[dict[str, float] | None] = [None] * len(self._tiles)
        self._small = {number: bytearray(job.outputs[number].nbytes) for number in small}
        self._written = dict.fromkeys([*outputs, *small], 0)
        self._lock = Lock()
        self._held: list[np.ndarray] | None = None

    @property
    def name(self) -> str:
        return self.job.where()

    @property
    def bytes_read(self) -> int:
        return sum(weight.nbytes for weight in self.job.inputs)

    def run(self, index: int, file: DataFile, stop: Event) -> int:
        with self._lock:
            if self._held is None:
                # Inputs that are not mapped are materialised once for all tiles, not once for each.
                self._held = [item.view() for item in self.job.inputs if not isinstance(item, MappedWeight)]
        if stop.is_set():
            raise Cancelled
        output = self.job.run(self._tiles[index])
        done = 0
        for number, offset, data in output.writes:
            count = memoryview(data).nbytes
            if offset < 0 or offset + count > self.job.outputs[number].nbytes:
                raise CompilerBug("a weight job writes outside of its output", where=self.name)
            region = self._outputs.get(number)
            if region is not None:
                done += file.write(region.offset + offset, data)
            elif number in self._small:
                self._small[number][offset : offset + count] = memoryview(data).cast("B")
            else:
                continue
            with self._lock:
                self._written[number] += count
        inputs = self.job.inputs
        if output.reads is None:
            for weight in inputs:
                weight.release()
        else:
            for number, start, end in output.reads:
                inputs[number].release(start, end)
        self._stats[index] = output.stats
        return done

    @property
    def kept(self) -> dict[Hashable, bytes]:
        weights = {number: DerivedWeight(self.job, number) for number in self._small}
        return {weight.storage_key: bytes(self._small[number]) for number, weight in weights.items()}

    def finish(self) -> dict[str, Any] | None:
        self._held = None
        for number, count in self._written.items():
            wanted = self.job.outputs[number].nbytes
            if count != wanted:
                raise CompilerBug(f"a weight job wrote {count} of {wanted} bytes of output {number}", where=self.name)
        return self.job.finish([stats for stats in self._stats if stats is not None])


def plan_work(layout: Layout) -> list[Unit]:
    """Return the work that fills a layout, in the order of the file."""
    units: list[Unit] = []
    jobs: dict[Hashable, tuple[WeightJob, dict[int, Region]]] = {}
    places: dict[Hashable, int] = {}
    for region in layout.regions.values():
        weight = region.weight
        if isinstance(weight, DerivedWeight):
            job, outputs = jobs.setdefault(weight.job.key, (weight.job, {}))
            if not outputs:
                places[weight.job.key] = len(units)
                units.append(_Stream(region))  # its place; replaced below, when all outputs are known
            outputs[weight.index] = region
        elif isinstance(weight, MappedWeight):
            units.append(_Copy(region, weight))
        else:
            units.append(_Stream(region))
    small: dict[Hashable, set[int]] = {}
    for weight in layout.small.values():
        small.setdefault(weight.job.key, set()).add(weight.index)
    for key, (job, outputs) in jobs.items():
        units[places[key]] = _Job(job, outputs, small.get(key, set()))
    return units
