"""Recorded weight work: passes say what a weight is to become, the save computes it, tile by tile."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.ir.weights.weight import Weight

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

__all__ = ["DerivedWeight", "TensorSpec", "Tile", "TileOutput", "WeightJob", "derive"]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and element type (`TensorProto.DataType`) of one output of a job."""

    shape: tuple[int, ...]
    onnx_dtype: int

    @property
    def nbytes(self) -> int:
        """Bytes as ONNX `raw_data`."""
        return dtypes.packed_nbytes(self.shape, self.onnx_dtype)


@dataclass(frozen=True)
class Tile:
    """An independent piece of a job. What `start`, `stop` and `extra` mean is the job's own business.

    Attributes:
        start: First row, column, element, ... of the piece.
        stop: One past the last.
        nbytes: Memory in bytes that running the tile takes: pages of inputs that it touches, temporaries and outputs.
        extra: Anything else that the job needs.
    """

    start: int = 0
    stop: int = 0
    nbytes: int = 0
    extra: Any = None


@dataclass
class TileOutput:
    """What a tile produced.

    Attributes:
        writes: (index of the output, byte offset in its raw data, bytes). Together a job's tiles write every byte once.
        stats: Numbers for the report; `WeightJob.finish` combines them.
        reads: (index of the input, first byte, one past the last byte) ranges that the tile touched, whose mapped pages
            can go. None: all of all inputs.
    """

    writes: list[tuple[int, int, Buffer]]
    stats: dict[str, float] = field(default_factory=dict)
    reads: list[tuple[int, int, int]] | None = None


class WeightJob(ABC):
    """Work on weights, recorded by a pass and run once, at save.

    Attributes:
        inputs: What it reads.
        outputs: What it makes.
        fingerprint: Stable text of what it computes, parameters and code version included. Two jobs of one class with
            the same fingerprint and inputs give the same bytes, on every machine and in every run.
        figures: What `finish` said when the job was computed in memory as a whole; None before.
    """

    inputs: tuple[Weight, ...]
    outputs: tuple[TensorSpec, ...]
    fingerprint: str
    figures: dict[str, Any] | None = None

    @abstractmethod
    def tiles(self) -> Sequence[Tile]:
        """Return the independent pieces, always the same ones, each with about 32 MB of input or less."""

    @abstractmethod
    def run(self, tile: Tile) -> TileOutput:
        """Compute one piece. Runs on several threads at a time; same tile, same bytes."""

    @abstractmethod
    def where(self) -> str:
        """Return the name of the weight, for messages and reports."""

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Combine the tiles' numbers, given in tile order. Default: sums.

        Raises:
            ModelError: What the tiles saw makes the result useless, e.g. NaN weights.
        """
        total: dict[str, Any] = {}
        for tile in stats:
            for name, value in tile.items():
                total[name] = total.get(name, 0.0) + value
        return total

    @property
    def key(self) -> Hashable:
        """Identity: jobs with equal keys compute the same bytes."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return (kind, self.fingerprint, tuple(weight.key for weight in self.inputs), self.outputs)

    def compute(self) -> list[np.ndarray]:
        """Run the whole job in memory and return the raw bytes (flat uint8 arrays) of its outputs.

        Raises:
            ModelError: From `finish`.
        """
        results = [np.zeros(spec.nbytes, np.uint8) for spec in self.outputs]
        stats = []
        for tile in self.tiles():
            output = self.run(tile)
            for index, offset, data in output.writes:
                piece = np.frombuffer(data, np.uint8)
                if offset < 0 or offset + piece.size > results[index].size:
                    raise CompilerBug("a weight job writes outside of its output", where=self.where())
                results[index][offset : offset + piece.size] = piece
            stats.append(output.stats)
        self.figures = self.finish(stats)
        for weight in self.inputs:
            weight.release()
        return results


class DerivedWeight(Weight):
    """Output `index` of a job that has not run yet. Reading it runs the job in memory."""

    def __init__(self, job: WeightJob, index: int) -> None:
        spec = job.outputs[index]
        super().__init__(spec.shape, spec.onnx_dtype)
        self.job = job
        self.index = index

    @property
    def storage_key(self) -> Hashable:
        """Identity of the raw bytes, see `Weight.storage_key`."""
        return ("job", self.job.key, self.index)

    def raw(self) -> Buffer:
        """Return the raw bytes, see `Weight.raw`."""
        return _LATEST.compute(self.job)[self.index]

    def view(self) -> np.ndarray:
        """Return the content, see `Weight.view`; computed once for those who look at the same time."""
        return self._shared(self._unpacked)

    def digest(self) -> bytes:
        """Return a SHA-256 that says what is computed from which content: equal digests mean equal content."""
        if self._digest is None:
            digest = hashlib.sha256(f"job {type(self.job).__qualname__} {self.index} {self.job.fingerprint}\n".encode())
            for weight in self.job.inputs:
                digest.update(weight.digest())
            self._digest = digest.digest()
        return self._digest


def derive(job: WeightJob) -> tuple[DerivedWeight, ...]:
    """Return the job's outputs as weights; nothing is computed yet."""
    return tuple(DerivedWeight(job, index) for index in range(len(job.outputs)))


class _LatestResult:
    """Keeps the last small result: the outputs of one job are usually read one after the other."""

    LIMIT_BYTES = 64 << 20

    def __init__(self) -> None:
        self._lock = Lock()
        self._job: WeightJob | None = None
        self._result: list[np.ndarray] = []

    def compute(self, job: WeightJob) -> list[np.ndarray]:
        with self._lock:
            if self._job is job:
                return self._result
        result = job.compute()
        with self._lock:
            if sum(array.nbytes for array in result) <= self.LIMIT_BYTES:
                self._job, self._result = job, result
        return result


_LATEST = _LatestResult()
