"""Whether two ONNX models of the same interface compute the same: the harness of all fusion tests.

The source runs without ONNX Runtime's optimisations, as the reference; the candidate runs as it is deployed.

Rows of padding (attention_mask 0) are not compared, neither their logits nor their part of the cache: no real token
attends to them, so nothing that is used depends on them, and what a row sees whose keys are all masked differs by
operator (zeros, a mean over everything, or not a number).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxslim_llm.runtime.session import Array, Session, open_session
from onnxslim_llm.runtime.signature import find_decoder

__all__ = ["TOLERANCE", "CaseResult", "Equality", "compare", "delta"]

# The limit of the issue for float32 logits of spread 1; rounding in another order gives about 1e-6.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class CaseResult:
    """Largest |source - candidate| over all compared outputs of one case; inf if only the candidate fails."""

    name: str
    max_abs: float
    note: str = ""


@dataclass(frozen=True)
class Equality:
    """Result of a comparison.

    Attributes:
        cases: what was run and compared.
        skipped: (case, reason): the source itself has no input for it, fails on it or gives no finite numbers.
        greedy: tokens of the greedy continuation that were compared, 0 if the model generates nothing.
        greedy_match: share of them before the first difference.
        interface: differences of names, order and types of inputs and outputs.
    """

    cases: tuple[CaseResult, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    greedy: int = 0
    greedy_match: float = 1.0
    interface: tuple[str, ...] = ()

    @property
    def max_abs(self) -> float:
        """Largest difference of all cases; inf if nothing could be compared."""
        return max((case.max_abs for case in self.cases), default=float("inf"))

    def check(self, tolerance: float = TOLERANCE) -> None:
        """Fail with every case that differs."""
        wrong = [
            f"{c.name}: |delta| {c.max_abs:.3g} {c.note}".strip() for c in self.cases if not c.max_abs <= tolerance
        ]
        if self.greedy_match < 1:
            wrong.append(f"greedy tokens differ after {self.greedy_match:.0%} of {self.greedy}")
        assert not self.interface, "\n".join(self.interface)
        assert self.cases, f"nothing could be compared: {self.skipped}"
        assert not wrong, "\n".join(wrong)


def compare(source: str | Path, candidate: str | Path) -> Equality:
    """Run all cases that `source` allows through both models.

    Raises:
        ModelError: one of the files cannot be opened.
    """
    from zoo import decoder_equality, tensor_equality

    reference = open_session(source, threads=1, optimise=False)
    other = open_session(candidate, threads=1)
    interface = _interface(reference, other)
    if interface:
        return Equality((), interface=interface)
    signature, _ = find_decoder(reference)
    if signature is not None:
        return decoder_equality.compare(reference, other, signature)
    return tensor_equality.compare(reference, other)


def delta(source: Array, candidate: Array, rows: Array | None = None) -> float:
    """Largest absolute difference, over `rows` (a mask of the leading dimensions) only if given.

    Infinite if the candidate is not finite or not of the same shape; NaN if the source itself is not finite.
    """
    if source.shape != candidate.shape:
        return float("inf")
    a, b = source.astype(np.float64), candidate.astype(np.float64)
    if rows is not None:
        a, b = a[rows.astype(bool)], b[rows.astype(bool)]
    if not np.isfinite(a).all():
        return float("nan")
    if not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max(initial=0.0))


def _interface(source: Session, candidate: Session) -> tuple[str, ...]:
    found = []
    for what, mine, theirs in (
        ("inputs", source.inputs, candidate.inputs),
        ("outputs", source.outputs, candidate.outputs),
    ):
        if [(i.name, i.kind) for i in mine] != [(i.name, i.kind) for i in theirs]:
            found.append(f"{what} are {[i.name for i in theirs]} instead of {[i.name for i in mine]}")
    return tuple(found)
