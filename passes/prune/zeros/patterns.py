"""Which weights of a matrix go: the ones with the lowest scores that a pattern allows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.errors import UsageError, did_you_mean

__all__ = ["Pattern"]

Array = NDArray[Any]

_NAMES = ("unstructured", "2:4", "4:8", "16x1", "16x16")
_N_OF_M = re.compile(r"(\d+):(\d+)")
_BLOCK = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie in W[K, N].

    Attributes:
        text: How the user wrote it.
        keep: n of "n:m": so many are kept
        group: m of "n:m": of so many neighbours along K; 0 for other patterns.
        block: (rows, columns) that are zero or not as a whole; (1, 1) for single weights.
    """

    text: str
    keep: int = 0
    group: int = 0
    block: tuple[int, int] = (1, 1)

    @classmethod
    def parse(cls, text: str, where: str) -> Pattern:
        """Read "unstructured", "n:m" (n of m are kept) or "KxN" (blocks).

        Raises:
            UsageError: It is none of these.
        """
        if text == "unstructured":
            return cls(text)
        if match := _N_OF_M.fullmatch(text):
            keep, group = map(int, match.groups())
            if 0 < keep < group:
                return cls(text, keep, group)
            raise UsageError(f"'{text}' would keep {keep} of {group}", where=where, todo="write 2:4, 4:8, ...")
        if match := _BLOCK.fullmatch(text):
            rows, columns = map(int, match.groups())
            if rows and columns:
                return cls(text, block=(rows, columns))
        raise UsageError(f"unknown pattern '{text}'", where=where, todo=did_you_mean(text, _NAMES))

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern itself fixes; None if it leaves that open."""
        return 1 - self.keep / self.group if self.group else None

    def refusal(self, rows: int, columns: int) -> str:
        """Return why a matrix cannot have this pattern, or nothing."""
        if self.group and rows % self.group:
            return f"K = {rows} is no multiple of {self.group}, which '{self.text}' needs"
        high, wide = self.block
        if rows % high or columns % wide:
            return f"[{rows}, {columns}] cannot be cut into blocks of {self.text}"
        return ""

    def kept(self, scores: Array, sparsity: float) -> NDArray[np.bool_]:
        """Return which weights stay.

        Args:
            scores: How much each weight of a piece [K, n] matters, not negative; blocks count by the sum.
            sparsity: Share of zeros, [0, 1); what "n:m" fixes itself is not changed by it.
        """
        if self.group:
            rows, columns = scores.shape
            groups = scores.reshape(rows // self.group, self.group, columns)
            kept = np.zeros(groups.shape, bool)
            best = np.argpartition(-groups, self.keep - 1, axis=1)[:, : self.keep]
            np.put_along_axis(kept, best, True, axis=1)
            return kept.reshape(rows, columns)
        high, wide = self.block
        if self.block == (1, 1):
            return _largest(scores, sparsity)
        rows, columns = scores.shape
        blocks = scores.reshape(rows // high, high, columns // wide, wide).sum(axis=(1, 3))
        return np.repeat(np.repeat(_largest(blocks, sparsity), high, axis=0), wide, axis=1)


def _largest(scores: Array, sparsity: float) -> NDArray[np.bool_]:
    """Return where the largest scores are; exactly round(size * sparsity) of them are left out."""
    flat = scores.reshape(-1)
    count = round(flat.size * sparsity)
    kept = np.ones(flat.size, bool)
    if count:
        kept[np.argpartition(flat, count - 1)[:count]] = False
    return kept.reshape(scores.shape)
