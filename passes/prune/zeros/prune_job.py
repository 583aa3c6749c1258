"""The recorded work of pruning one matrix: tiles of columns, at save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.errors import ModelError
from onnxslim_llm.gradients.source import StoredFigures
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.prune.zeros.one_shot import prune_in_order
from onnxslim_llm.passes.prune.zeros.patterns import Pattern
from onnxslim_llm.passes.prune.zeros.refit import refit
from onnxslim_llm.passes.prune.zeros.scores import Method, scores_of
from onnxslim_llm.stats.curvature import DAMPING, inverse_factor, output_error
from onnxslim_llm.stats.prepared import Prepared
from onnxslim_llm.stats.statistics import Collected, StoredMoments

__all__ = ["Comparison", "PruneJob", "Request"]

Array = NDArray[Any]

Comparison = Literal["matrix", "column"]

#: Part of the fingerprint: raise it when the same request gives other bytes.
_VERSION = 2
#: Columns of a tile: enough for matrix products to be efficient, few enough for all threads to have some.
_TILE_COLUMNS = 512


@dataclass(frozen=True)
class Request:
    """How one weight is pruned.

    Attributes:
        sparsity: Share of zeros.
        pattern: Where they may lie.
        method: What chooses them.
        compare: What scores are compared within: each column, or all columns of a tile.
        refit: Fit the kept weights to what the product computed, where that helps on samples that were held out.
        steps: So many times a share of the zeros is chosen and the rest fitted again: after step t of T the sparsity is
            s (1 - (1 - t/T)^3) (Zhu & Gupta 2017, arXiv 1710.01878).
        error_limit: A tile stops before the step that would make its relative output error larger than this; 0: never.
    """

    sparsity: float
    pattern: Pattern
    method: Method
    compare: Comparison = "matrix"
    refit: bool = True
    steps: int = 1
    error_limit: float = 0.0

    def schedule(self) -> Iterator[float]:
        """Yield the sparsity after each step."""
        for step in range(1, self.steps + 1):
            yield self.sparsity * (1 - (1 - step / self.steps) ** 3)


@dataclass(frozen=True)
class _Data:
    """What jobs need of the moments of an input, float32.

    Attributes:
        mean_square: E[x_k^2] [K].
        unexplained: The share of it that the other inputs do not tell, 1 / (H_kk [H^-1]_kk) [K]; 1 without U.
        factor: U, with H^-1 = U^T U, or None.
        fit, held: H of both parts of the samples [K, K].
    """

    mean_square: Array
    unexplained: Array
    factor: Array | None
    fit: Array
    held: Array


def _prepare(collected: Collected) -> _Data:
    fit, held = collected.fit, collected.held
    assert fit.gram is not None
    assert held.gram is not None
    factor = inverse_factor(fit.gram)
    unexplained = np.ones(fit.size, np.float32)
    if factor is not None:
        damped = np.diagonal(fit.gram) + DAMPING * np.diagonal(fit.gram).mean()
        unexplained = np.minimum(1 / (damped * np.square(factor).sum(axis=0)), 1).astype(np.float32)
    return _Data(
        fit.mean_square.astype(np.float32),
        unexplained,
        factor,
        fit.gram.astype(np.float32),
        held.gram.astype(np.float32),
    )


_PREPARED = Prepared(_prepare)


class PruneJob(WeightJob):
    """Set weights of a matrix to zero and fit the others again.

    Args:
        source: The weight, stored [K, N] or [N, K].
        k_axis: Which of the source's two axes is K.
        request: How.
        name: Name of the weight, for messages.
        moments: Of the input of the product; None if there are none.
        gradients: Figures of the weight's gradients, for the methods that ask for them.
    """

    def __init__(
        self,
        source: Weight,
        k_axis: int,
        request: Request,
        name: str,
        moments: StoredMoments | None = None,
        gradients: StoredFigures | None = None,
    ) -> None:
        self.inputs = (source,)
        self.outputs = (TensorSpec(source.shape, source.onnx_dtype),)
        self.k_axis, self.request, self.name = k_axis, request, name
        self.moments, self.gradients = moments, gradients
        self.rows, self.columns = source.shape[k_axis], source.shape[1 - k_axis]
        known = [stored.digest for stored in (moments, gradients) if stored is not None]
        self.fingerprint = f"prune v{_VERSION} {request} K={k_axis} {' '.join(known) or 'without data'}"

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of columns, multiples of the pattern's block."""
        wide = self.request.pattern.block[1]
        step = max(wide, _TILE_COLUMNS // wide * wide)
        # The piece, what is left of it, a mask and what fitting needs, in float32.
        size = 6 * 4 * self.rows
        return [Tile(a, min(a + step, self.columns), size * step) for a in range(0, self.columns, step)]

    def run(self, tile: Tile) -> TileOutput:
        """Prune a range of columns.

        Raises:
            ModelError: The weight holds NaN or infinite values.
        """
        source = self.inputs[0].view()
        matrix = source if self.k_axis == 0 else source.T
        piece = np.ascontiguousarray(matrix[:, tile.start : tile.stop], dtype=np.float32)
        if not np.isfinite(piece).all():
            todo = "export the model again, or leave this weight alone with prune_weights.exclude"
            raise ModelError("the weight has NaN or infinite values", where=f"tensor '{self.name}'", todo=todo)
        data = _PREPARED.of(self.moments) if self.moments else None
        pruned = self._pruned(piece, data, self._slopes(tile))
        stats = {
            "zeros": float(pruned.size - np.count_nonzero(pruned)),
            "elements": float(pruned.size),
            "sq_error": float(np.square(piece - pruned, dtype=np.float64).sum()),
            "sq_weight": float(np.square(piece, dtype=np.float64).sum()),
        }
        if data is not None:
            stats["output_error"] = float(output_error(piece - pruned, data.held).sum())
            stats["output_signal"] = float(output_error(piece, data.held).sum())
        return TileOutput(self._writes(pruned.astype(source.dtype), tile), stats)

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Sum up, and say how sparse the weight is and what that costs."""
        total = super().finish(stats)
        total["sparsity"] = total["zeros"] / total["elements"]
        total["relative_error"] = math.sqrt(total["sq_error"] / total["sq_weight"]) if total["sq_weight"] else 0.0
        signal = total.get("output_signal", 0.0)
        if signal:
            total["relative_output_error"] = math.sqrt(total["output_error"] / signal)
        return total

    def _slopes(self, tile: Tile) -> Array | None:
        """Return the figures of the gradients of a tile [K, n]."""
        if self.gradients is None:
            return None
        stored = self.gradients.view()
        return np.ascontiguousarray((stored if self.k_axis == 0 else stored.T)[:, tile.start : tile.stop])

    def _pruned(self, piece: Array, data: _Data | None, slopes: Array | None) -> Array:
        current = piece
        for sparsity in self.request.schedule():
            following = self._step(piece, current, sparsity, data, slopes)
            limit = self.request.error_limit
            if limit and data is not None:
                error = output_error(piece - following, data.held).sum()
                if error > limit**2 * output_error(piece, data.held).sum():
                    break
            current = following
        return current

    def _step(self, piece: Array, current: Array, sparsity: float, data: _Data | None, slopes: Array | None) -> Array:
        """Return `current` with more zeros, fitted to what `piece` computes."""
        pattern, method = self.request.pattern, self.request.method
        factor = data.factor if data is not None else None
        if method == "sparsegpt" and factor is not None:
            pruned, kept = prune_in_order(current, factor, pattern, sparsity)
        else:
            scores = scores_of(method, current, data.mean_square if data is not None else None, slopes)
            if self.request.refit and method != "magnitude" and data is not None:
                # The fit makes up for what the other inputs tell of this one: only the rest is lost with a weight.
                scores *= (np.sqrt(data.unexplained) if method == "taylor" else data.unexplained)[:, None]
            kept = self._kept(scores, sparsity)
            pruned = np.where(kept, current, 0)
        if data is None or not self.request.refit:
            return pruned
        fitted = refit(piece, pruned, kept, data.fit)
        better = output_error(piece - fitted, data.held) < output_error(piece - pruned, data.held)
        return np.where(better, fitted, pruned)

    def _kept(self, scores: Array, sparsity: float) -> NDArray[np.bool_]:
        """Return which weights stay."""
        pattern = self.request.pattern
        if pattern.group or pattern.block != (1, 1) or self.request.compare == "matrix":
            return pattern.kept(scores, sparsity)
        count = round(len(scores) * sparsity)
        kept = np.ones(scores.shape, bool)
        if count:
            np.put_along_axis(kept, np.argpartition(scores, count - 1, axis=0)[:count], False, axis=0)
        return kept

    def _writes(self, pruned: Array, tile: Tile) -> list[tuple[int, int, Any]]:
        size = pruned.dtype.itemsize
        if self.k_axis == 1:
            flat = np.ascontiguousarray(pruned.T).reshape(-1).view(np.uint8)
            return [(0, tile.start * self.rows * size, flat)]
        lines = np.ascontiguousarray(pruned).view(np.uint8)
        stride, first = self.columns * size, tile.start * size
        if tile.stop - tile.start == self.columns:
            return [(0, 0, lines.reshape(-1))]
        return [(0, k * stride + first, line) for k, line in enumerate(lines)]
