"""How far two outputs are apart: running sums, so that no output is kept longer than its case."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxslim_llm.runtime.session import Array

__all__ = ["SQNR_CAP_DB", "ErrorFigures", "ErrorSums", "LogitSums", "kl_divergence", "log_softmax"]

# Equal outputs have an infinite signal-to-noise ratio, which JSON cannot hold; float64 itself ends near 313 dB.
SQNR_CAP_DB = 320.0

_BLOCK = 1 << 20  # elements in float64 at a time: 8 MB per operand


@dataclass(frozen=True)
class ErrorFigures:
    """Error of one output, or of several together.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: largest difference relative to the source's magnitude there, or to the output's root mean square where
            the source is smaller than that, so that values near zero do not dominate.
        sqnr_db: 10 log10(sum source^2 / sum difference^2), at most `SQNR_CAP_DB`.
        cosine: of the angle between both outputs as one vector each.
        absmax: largest magnitude of the source.
        count: number of elements compared.
    """

    max_abs: float
    max_rel: float
    sqnr_db: float
    cosine: float
    absmax: float
    count: int


class ErrorSums:
    """Collects what `ErrorFigures` needs; infinities and NaN are counted apart."""

    def __init__(self) -> None:
        self.nonfinite = 0  # elements that are finite in the source and not in the other, or infinite elsewhere
        self.source_nan = 0  # elements without a true value to compare with
        self._max_abs = self._max_rel = self._absmax = 0.0
        self._source = self._other = self._error = self._dot = 0.0
        self._count = 0

    def add(self, source: Array, other: Array) -> None:
        """Take in two arrays of the same shape and of any numeric type."""
        a, b = source.reshape(-1), other.reshape(-1)
        rms = math.sqrt(sum(float(np.dot(x, x)) for x, _ in self._finite(a, b)) / max(a.size, 1))
        for x, y in self._finite(a, b, count=True):
            if not x.size:
                continue
            difference = np.abs(x - y)
            self._max_abs = max(self._max_abs, float(difference.max()))
            self._absmax = max(self._absmax, float(np.abs(x).max()))
            floor = np.maximum(np.abs(x), rms)
            relative = np.divide(difference, floor, out=np.where(difference > 0, np.inf, 0.0), where=floor > 0)
            self._max_rel = max(self._max_rel, float(relative.max()))
            self._source += float(np.dot(x, x))
            self._other += float(np.dot(y, y))
            self._error += float(np.dot(difference, difference))
            self._dot += float(np.dot(x, y))
            self._count += x.size

    def _finite(self, a: Array, b: Array, *, count: bool = False) -> Iterator[tuple[Array, Array]]:
        for start in range(0, a.size, _BLOCK):
            x = a[start : start + _BLOCK].astype(np.float64)
            y = b[start : start + _BLOCK].astype(np.float64)
            fine = np.isfinite(x) & np.isfinite(y)
            if not fine.all():
                if count:
                    nan = np.isnan(x)
                    self.source_nan += int(nan.sum())
                    self.nonfinite += int((~fine & ~nan & (x != y)).sum())
                x, y = x[fine], y[fine]
            yield x, y

    def figures(self) -> ErrorFigures:
        """The figures of everything that was added."""
        norms = math.sqrt(self._source) * math.sqrt(self._other)
        return ErrorFigures(
            max_abs=self._max_abs,
            max_rel=self._max_rel,
            sqnr_db=_sqnr(self._source, self._error),
            cosine=_cosine(self._dot, norms, self._error),
            absmax=self._absmax,
            count=self._count,
        )


def _cosine(dot: float, norms: float, error: float) -> float:
    if error == 0:
        return 1.0
    return min(1.0, dot / norms) if norms else 0.0


def _sqnr(signal: float, noise: float) -> float:
    if noise == 0:
        return SQNR_CAP_DB
    if signal == 0:
        return -SQNR_CAP_DB
    return min(SQNR_CAP_DB, 10 * math.log10(signal / noise))


class LogitSums:
    """Collects how two next-token distributions differ, token by token."""

    def __init__(self) -> None:
        self._kl: list[Array] = []
        self._agree = 0
        self.tokens = 0

    def add(self, source: Array, other: Array) -> None:
        """Take in logits [n, V] of the same tokens; tokens with non-finite logits are left out."""
        rows = max(1, _BLOCK // max(source.shape[-1], 1))
        for start in range(0, source.shape[0], rows):
            x = source[start : start + rows].astype(np.float64)
            y = other[start : start + rows].astype(np.float64)
            fine = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
            x, y = x[fine], y[fine]
            self._kl.append(kl_divergence(x, y))
            self._agree += int((x.argmax(axis=1) == y.argmax(axis=1)).sum())
            self.tokens += len(x)

    @property
    def kl(self) -> Array:
        """KL divergence of every token so far, in nats."""
        return np.concatenate(self._kl) if self._kl else np.zeros(0)

    @property
    def kl_mean(self) -> float | None:
        """Mean over tokens, None without tokens."""
        return float(self.kl.mean()) if self.tokens else None

    @property
    def top1_agreement(self) -> float | None:
        """Share of tokens for which both models find the same token the likeliest."""
        return self._agree / self.tokens if self.tokens else None


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of the probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True).astype(np.float64)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergence(source: Array, other: Array) -> Array:
    """KL(softmax(source) || softmax(other)) of every row, in nats; never negative."""
    if not source.shape[0]:
        return np.zeros(0)
    p, q = log_softmax(source), log_softmax(other)
    divergence: Array = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return divergence
