"""Codes chosen again for the input that a product has behind coded weights, and for what it should make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.passes.quantize.codes.calibrated_job import CodedJob
from onnxslim_llm.passes.quantize.codes.coded_sites import CodedSite
from onnxslim_llm.passes.quantize.codes.coding import InputKnowledge, best_codes, nearest_codes
from onnxslim_llm.passes.quantize.codes.compensate import Coded
from onnxslim_llm.stats.curvature import inverse_factor
from onnxslim_llm.stats.replay import Drift
from onnxslim_llm.stats.taps import Tap

__all__ = ["CodedWeight", "InOrder", "recoded"]

Array = NDArray[Any]

#: Columns coded at a time.
_COLUMNS = 512
#: Rows of the input for each of its channels: a least-squares solution of T rows has some K / T more error on other
#: rows than on its own. With 2 to 7 of them all-MiniLM-L6-v2 got 13 % worse.
_ROWS_OF_CHANNEL = 8


@dataclass
class CodedWeight:
    """A weight whose codes may change.

    Attributes:
        sites: What stores it: one, or one for each plane of its codes.
        coded: Its codes, once they are chosen.
        columns: How many columns have got other codes.
        reason: Why it stays as it is; empty where it does not.
    """

    sites: list[CodedSite]
    coded: Coded | None = field(default=None, repr=False)
    columns: int = 0
    reason: str = ""

    @property
    def scheme(self) -> WeightScheme:
        """How its codes are chosen."""
        job = self.sites[0].job
        return job.chosen_scheme if isinstance(job, CodedJob) else job.scheme

    @property
    def looked_up(self) -> bool:
        """Whether it is a table of look-ups, whose errors come before everything that could make up for them."""
        return any(site.looked_up for site in self.sites)

    def matrix(self) -> Array:
        """Return W [K, N], as it was before it was coded."""
        job = self.sites[0].job
        view: Array = job.inputs[0].view()
        return view if job.k_axis == 0 else view.T

    def first(self, piece: Array) -> Coded:
        """Return the codes that columns W[K, n] have now."""
        job = self.sites[0].job
        return job.choose(piece)[0] if isinstance(job, CodedJob) else nearest_codes(piece, job.scheme)

    def dequantized(self) -> Array:
        """Return what the codes stand for, [K, N] float32."""
        assert self.coded is not None
        return self.coded.dequantized(self.scheme.block_rows(len(self.coded.codes)))


def recoded(
    piece: Array, old: Coded, scheme: WeightScheme, known: InputKnowledge, fit: Array, held: Array
) -> tuple[Coded, Array]:
    """Return better codes for W[K, n], and in which columns they differ from the old ones [n].

    With H the sums of the input as it is now, the least squared error of the output is where W + H^-1 X^T (Y - X W) is:
    that is coded. What is exactly zero stays zero. A column keeps its old codes where the samples that were held out
    say so.

    Args:
        piece: W, float32.
        old: Its codes.
        scheme: Their form.
        known: Of the input as it is now.
        fit: X^T (Y - X W) [K, n] of the samples that codes are fitted to.
        held: The same of those that were held out.
    """
    assert known.factor is not None
    aim = np.where(piece != 0, piece + known.factor.T @ (known.factor @ fit.astype(np.float32)), 0).astype(np.float32)
    new, _ = best_codes(aim, scheme, known)
    block = scheme.block_rows(len(piece))

    def lost(coded: Coded) -> Array:
        move = coded.dequantized(block) - piece
        slope = known.held @ move - 2 * held
        result: Array = np.einsum("kn,kn->n", move, slope, dtype=np.float64)
        return result

    better = lost(new) < lost(old)
    return _picked(better, new, old), better


@dataclass
class InOrder:
    """Codes weights as a replay comes to them; see `stats.replay.Coder`.

    Attributes:
        weights: By the initializer's name in the source: a tied table may have two.
        threads: Columns are coded in so many at a time.
    """

    weights: Mapping[str, CodedWeight]
    threads: int = 1
    _read: Callable[[str], Array] = field(init=False, repr=False)

    def begin(self, weight: Callable[[str], Array], tables: tuple[str, ...]) -> dict[str, Array]:
        """Return tables as their codes have them."""
        self._read = weight
        found = {}
        for name in tables:
            entry = self.weights.get(name)
            if entry is not None and entry.looked_up and (turned := self._turned(name, entry)) is not None:
                self._keep_first(entry)
                found[name] = entry.dequantized().T if turned else entry.dequantized()
        return found

    def recode(self, tap: Tap, fit: Drift, held: Drift) -> dict[str, Array]:
        """Return the weights behind a tap with the codes that they have got for its drift."""
        known: InputKnowledge | None = None
        found = {}
        for name in tap.weights:
            entry = self.weights.get(name)
            turned = None if entry is None else self._turned(name, entry)
            if entry is None or turned is None:
                continue
            if entry.coded is None and entry.looked_up:
                self._keep_first(entry)
            elif entry.coded is None:
                known = known or _knowledge(fit, held)
                self._code(name, entry, known, fit, held)
            found[name] = entry.dequantized().T if turned else entry.dequantized()
        return found

    def _turned(self, name: str, entry: CodedWeight) -> bool | None:
        """Return whether the source has W transposed; None, with the reason, where it has something else."""
        source, matrix = self._read(name), entry.matrix()
        for turned, array in ((False, source), (True, source.T)):
            if array.shape == matrix.shape and np.array_equal(array, matrix):
                return turned
        entry.reason = "a pass before has changed the weight"
        return None

    def _code(self, name: str, entry: CodedWeight, known: InputKnowledge, fit: Drift, held: Drift) -> None:
        if known.factor is None or fit.size != len(entry.matrix()):
            entry.reason = "the data say nothing about its input"
            self._keep_first(entry)
            return
        if fit.moments.count < _ROWS_OF_CHANNEL * fit.size:
            entry.reason = f"{fit.moments.count} rows of calibration data are too few for {fit.size} channels"
            self._keep_first(entry)
            return
        matrix = entry.matrix()

        def work(start: int) -> tuple[Coded, Array]:
            piece = np.ascontiguousarray(matrix[:, start : start + _COLUMNS], dtype=np.float32)
            part = slice(start, start + piece.shape[1])
            pulls = (drift.pull(name, piece, part) for drift in (fit, held))
            return recoded(piece, entry.first(piece), entry.scheme, known, *pulls)

        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            parts = list(pool.map(work, range(0, matrix.shape[1], _COLUMNS)))
        entry.coded = _joined([coded for coded, _ in parts])
        entry.columns = sum(int(better.sum()) for _, better in parts)
        if not entry.columns:
            entry.reason = "the held-out samples got no better"

    def _keep_first(self, entry: CodedWeight) -> None:
        matrix = entry.matrix()
        starts = range(0, matrix.shape[1], _COLUMNS)
        pieces = (np.ascontiguousarray(matrix[:, start : start + _COLUMNS], dtype=np.float32) for start in starts)
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            entry.coded = _joined(list(pool.map(entry.first, pieces)))


def _knowledge(fit: Drift, held: Drift) -> InputKnowledge:
    grams = []
    for drift in (fit, held):
        assert drift.moments.gram is not None
        grams.append(drift.moments.gram.astype(np.float32))
    assert fit.moments.gram is not None
    importance = fit.moments.mean_square.astype(np.float32)
    return InputKnowledge(importance, inverse_factor(fit.moments.gram), *grams)


def _picked(new_one: Array, new: Coded, old: Coded) -> Coded:
    parts = ((getattr(new, part), getattr(old, part)) for part in ("codes", "scales", "zeros"))
    return Coded(*(np.where(new_one, a, b) for a, b in parts))


def _joined(parts: list[Coded]) -> Coded:
    codes, scales, zeros = (
        np.concatenate([getattr(coded, part) for coded in parts], axis=1) for part in ("codes", "scales", "zeros")
    )
    return Coded(codes, scales.astype(np.float32), zeros)
