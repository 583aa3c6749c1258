"""The recorded work of splitting weights into two factors of low rank."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.stats.curvature import output_error
from onnxslim_llm.stats.prepared import Prepared
from onnxslim_llm.stats.statistics import Collected, StoredMoments
from onnxslim_llm.stats.whitened import Alike, ByChannel, Whitening, low_rank, whitened_by

__all__ = ["FactorJob", "Method", "matrix_of", "whitening_of"]

Array = NDArray[Any]

Method = Literal["svd", "asvd", "whitened"]

#: Part of the fingerprint: raise it when the same request gives other bytes.
_VERSION = 1
#: ASVD's alpha: the power of mean |x| that channels count by.
_ALPHA = 0.5
#: Share of the largest that a channel counts at least: one that never fires is no reason to divide by zero.
_FLOOR = 1e-4
#: Results kept in memory: what quantizes factors reads both of them, piece by piece, on several threads.
_KEPT = 4


def _by_gram(collected: Collected) -> Whitening:
    assert collected.fit.gram is not None
    return whitened_by(collected.fit.gram) or Alike()


def _by_channel(collected: Collected) -> Whitening:
    scale = collected.fit.mean_absolute**_ALPHA
    largest = float(scale.max())
    return ByChannel(np.maximum(scale, _FLOOR * largest)) if largest > 0 else Alike()


_PREPARED = {"whitened": Prepared(_by_gram), "asvd": Prepared(_by_channel)}


def whitening_of(method: Method, moments: StoredMoments | None) -> Whitening:
    """Return what an error is weighed by; all channels count alike without data, or where the data are zero."""
    return Alike() if method == "svd" or moments is None else _PREPARED[method].of(moments)


def matrix_of(sources: Sequence[tuple[Weight, int]], where: str) -> Array:
    """Return weights as W[K, N], side by side, float32.

    Args:
        sources: Each weight with the axis that is K.
        where: Name for messages.

    Raises:
        ModelError: A weight holds NaN or infinite values.
    """
    parts = [weight.view() if k_axis == 0 else weight.view().T for weight, k_axis in sources]
    matrix = np.concatenate([np.asarray(part, np.float32) for part in parts], axis=1)
    for weight, _ in sources:
        weight.release()
    if not np.isfinite(matrix).all():
        todo = "export the model again, or leave this weight alone with split_low_rank.exclude"
        raise ModelError("the weight has NaN or infinite values", where=f"tensor '{where}'", todo=todo)
    return matrix


class FactorJob(WeightJob):
    """Split weights of one input, W_i[K, N_i] ~ A[K, r] B_i[r, N_i]; the outputs are A, B_1, B_2, ...

    Args:
        sources: Each weight with the axis that is K; all of one element type.
        rank: r.
        method: What an error is weighed by.
        moments: Of the input; None for `method` "svd".
        name: Name of the (first) weight, for messages.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Weight, int]],
        rank: int,
        method: Method,
        moments: StoredMoments | None,
        name: str,
    ) -> None:
        self.sources = tuple(sources)
        self.inputs = tuple(weight for weight, _ in sources)
        self.rank, self.method, self.moments, self.name = rank, method, moments, name
        dtype = self.inputs[0].onnx_dtype
        self.rows = self.inputs[0].shape[sources[0][1]]
        self.columns = tuple(weight.shape[1 - k_axis] for weight, k_axis in sources)
        self.outputs = tuple(TensorSpec(shape, dtype) for shape in self._shapes())
        axes = ",".join(str(k_axis) for _, k_axis in sources)
        data = moments.digest if moments is not None else "without data"
        self.fingerprint = f"factors v{_VERSION} {method} rank={rank} K={axes} {data}"

    def _shapes(self) -> list[tuple[int, int]]:
        return [(self.rows, self.rank), *((self.rank, width) for width in self.columns)]

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return the matrix as a whole: its singular vectors are found at once."""
        short = min(self.rows, sum(self.columns))
        # H twice, the whitened matrix three times, eigenvectors and what finding them takes, in float64.
        return [Tile(0, 1, 8 * (2 * self.rows**2 + 3 * self.rows * sum(self.columns) + 4 * short**2))]

    def run(self, tile: Tile) -> TileOutput:
        """Compute the factors.

        Raises:
            ModelError: A weight holds NaN or infinite values.
        """
        matrix = matrix_of(self.sources, self.name)
        found = low_rank(matrix, whitening_of(self.method, self.moments), self.rank)
        kind = self.inputs[0].dtype
        parts = [found.left, *np.split(found.right, np.cumsum(self.columns)[:-1], axis=1)]
        stored = [np.ascontiguousarray(part.astype(kind)) for part in parts]
        left, right = stored[0].astype(np.float32), np.concatenate([s.astype(np.float32) for s in stored[1:]], axis=1)
        error = matrix - left @ right
        stats = {
            "sq_error": float(np.square(error, dtype=np.float64).sum()),
            "sq_weight": float(np.square(matrix, dtype=np.float64).sum()),
        }
        if self.moments is not None:
            held = self.moments.load().held.gram
            assert held is not None
            stats["output_error"] = float(output_error(error, held).sum())
            stats["output_signal"] = float(output_error(matrix, held).sum())
        return TileOutput([(i, 0, part.reshape(-1).view(np.uint8)) for i, part in enumerate(stored)], stats)

    def compute(self) -> list[np.ndarray]:
        """Return the raw bytes of the factors, as `WeightJob.compute` does; those of the last few jobs are kept."""
        return _COMPUTED.of(self)

    def computed(self) -> list[np.ndarray]:
        """Compute the factors in memory."""
        return super().compute()

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Say what the missing directions cost."""
        total = super().finish(stats)
        total["rank"] = self.rank
        total["relative_error"] = math.sqrt(total["sq_error"] / total["sq_weight"]) if total["sq_weight"] else 0.0
        signal = total.get("output_signal", 0.0)
        if signal:
            total["relative_output_error"] = math.sqrt(total["output_error"] / signal)
        return total


class _Computed:
    """The results of the last few jobs; each is computed once, however many threads ask for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # With the jobs: their keys mean something only as long as their inputs are there.
        self._results: OrderedDict[Hashable, tuple[FactorJob, list[np.ndarray]]] = OrderedDict()
        self._turns: dict[Hashable, threading.Lock] = {}

    def of(self, job: FactorJob) -> list[np.ndarray]:
        key = job.key
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                known = self._results.get(key)
            if known is None:
                known = job, job.computed()
            with self._lock:
                self._results[key] = known
                self._results.move_to_end(key)
                while len(self._results) > _KEPT:
                    gone, _ = self._results.popitem(last=False)
                    self._turns.pop(gone, None)
        job.figures = known[0].figures
        return known[1]


_COMPUTED = _Computed()
