"""What blocks do to the residual stream, measured on calibration data while the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.stats.curvature import DAMPING

__all__ = ["StreamChanges", "StreamFit"]

Array = NDArray[Any]

#: Every so many samples one is held out: whether a fit helps is judged on these.
_HELD_EVERY = 8


@dataclass
class _Tap:
    """Takes in one tensor and tells its owner."""

    owner: _Watch
    name: str

    def add(self, values: Array) -> None:
        """Take in the values of one sample."""
        if not np.isfinite(values).all():
            raise FloatingPointError("NaN or infinite values")
        self.owner.arrived(self.name, values.reshape(-1, values.shape[-1]).astype(np.float32))


class _Watch:
    """Brings tensors of the same sample together, in whatever order they come.

    Args:
        groups: Names of tensors that are needed together.
    """

    def __init__(self, groups: Sequence[tuple[str, ...]]) -> None:
        self._groups = list(groups)
        self._held: dict[str, Array] = {}
        self._count: dict[str, int] = {}

    def collectors(self) -> dict[str, _Tap]:
        """Return what is to be given to an observer."""
        return {name: _Tap(self, name) for group in self._groups for name in group}

    def arrived(self, name: str, rows: Array) -> None:
        """Take in the rows [T, D] of a tensor; groups that are complete with it are handed on."""
        self._held[name] = rows
        sample = self._count[name] = self._count.get(name, 0) + 1
        for number, group in enumerate(self._groups):
            if name in group and all(self._count.get(other) == sample for other in group):
                self.complete(number, sample, [self._held[other] for other in group])

    def complete(self, number: int, sample: int, rows: list[Array]) -> None:
        """Take in all tensors of a group for one sample."""
        raise NotImplementedError


class StreamChanges(_Watch):
    """How far blocks turn the residual stream: 1 - cos(x, x'), the mean over all tokens.

    This is the block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853).

    Args:
        pairs: Names of x and x' of each block.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__(pairs)
        self._sums = np.zeros(len(pairs))
        self._tokens = np.zeros(len(pairs))

    def complete(self, number: int, sample: int, rows: list[Array]) -> None:
        """Take in both ends of a block."""
        before, after = (piece.astype(np.float64) for piece in rows)
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        cosine = np.einsum("td,td->t", before, after) / np.maximum(lengths, np.finfo(np.float64).tiny)
        self._sums[number] += (1 - cosine).sum()
        self._tokens[number] += len(before)

    @property
    def scores(self) -> list[float]:
        """The mean of each block."""
        return [float(value) for value in self._sums / np.maximum(self._tokens, 1)]


@dataclass
class _Moments:
    """Sums over tokens: U^T U, U^T C for what blocks add (C), and C^2 by channel."""

    gram: Array
    cross: Array
    tokens: int = 0
    square: Array = field(default_factory=lambda: np.zeros(1))


class StreamFit(_Watch):
    """What the product before some blocks can do in their place.

    Args:
        groups: Names of the product's input u, of x and of x'.
        sizes: K and D: the sizes of u and x.
    """

    def __init__(self, groups: Sequence[tuple[str, str, str]], sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__(groups)
        self._fit = [_Moments(np.zeros((k, k)), np.zeros((k, d))) for k, d in sizes]
        self._held_out = [_Moments(np.zeros((k, k)), np.zeros((k, d))) for k, d in sizes]

    def complete(self, number: int, sample: int, rows: list[Array]) -> None:
        """Take in the product's input and both ends of what goes."""
        inputs, before, after = rows
        added = after - before
        sums = (self._held_out if sample % _HELD_EVERY == 0 else self._fit)[number]
        sums.gram += inputs.T @ inputs
        sums.cross += inputs.T @ added
        sums.square = sums.square + np.square(added, dtype=np.float64).sum(axis=0)
        sums.tokens += len(inputs)

    def solution(self, number: int) -> tuple[Array, Mapping[str, float]]:
        """Return what is added to a product's weight, [K, D] float32, and what that is worth.

        It minimises ||x' - x - u V||^2 + damping ||V||^2; columns that this makes no better on samples that were held
        out are zero. The figures are shares of ||x' - x||^2 that are left without blocks on those samples.
        """
        fit = self._fit[number]
        held = self._held_out[number] if self._held_out[number].tokens else fit
        damping = DAMPING * float(np.diagonal(fit.gram).mean()) or 1.0
        change = np.linalg.solve(fit.gram + damping * np.eye(len(fit.gram)), fit.cross)
        gained = 2 * np.einsum("kn,kn->n", change, held.cross) - np.einsum("kn,kn->n", held.gram @ change, change)
        change[:, gained <= 0] = 0
        total = float(held.square.sum()) or 1.0
        return change.astype(np.float32), {"left_of_change": 1 - float(np.maximum(gained, 0).sum()) / total}
