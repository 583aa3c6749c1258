"""What each compressed layer lost, predicted and measured, ready to be shown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from onnxslim_llm.artifact.manifest import LayerError

__all__ = ["LayerRow", "agreement", "layer_rows", "paired"]


@dataclass(frozen=True)
class LayerRow:
    """One compressed weight; errors are shares, None where they are not known.

    Attributes:
        name: Of the weight.
        role: What it is for.
        bits: Of its codes.
        block: Elements that share a scale, 0 for a whole column.
        weight: Relative error of the weight itself.
        predicted: Relative error of its product's output, by the calibration data.
        measured: The same in the artifact; what the layers before it lost is part of it.
        reason: Why it has more bits than others.
    """

    name: str
    role: str
    bits: float | None
    block: int | None
    weight: float | None
    predicted: float | None
    measured: float | None
    reason: str


def layer_rows(layers: Sequence[LayerError]) -> list[LayerRow]:
    """Return the rows, the largest loss first: as measured, else as predicted, else of the weight."""
    rows = [
        LayerRow(
            layer.name,
            layer.role,
            layer.bits,
            layer.block,
            layer.relative_error,
            layer.predicted_error,
            None if layer.sqnr_db is None else 10 ** (-layer.sqnr_db / 20),
            layer.reason,
        )
        for layer in layers
    ]
    return sorted(rows, key=_loss)


def _loss(row: LayerRow) -> tuple[int, float]:
    for rank, figure in enumerate((row.measured, row.predicted, row.weight)):
        if figure is not None:
            return rank, -figure
    return 3, 0.0


def paired(rows: Sequence[LayerRow]) -> list[tuple[str, str, float, float]]:
    """Return (name, role, predicted, measured) of the layers that have both, and neither is zero."""
    return [(row.name, row.role, row.predicted, row.measured) for row in rows if row.predicted and row.measured]


def agreement(points: Sequence[tuple[str, str, float, float]]) -> float | None:
    """Return Spearman's rank correlation of predicted and measured errors; None for fewer than three layers."""
    if len(points) < 3:
        return None
    ranks = [_ranks([point[2] for point in points]), _ranks([point[3] for point in points])]
    try:
        return statistics.correlation(*ranks)
    except statistics.StatisticsError:  # all the same
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
