"""The sparse weights of an artifact: what form each has, and from how many zeros on a form is worth it."""

from __future__ import annotations

from dataclasses import dataclass

from onnxslim_llm.artifact.manifest import Manifest
from onnxslim_llm.report.format import ratio_text

__all__ = ["SparseRow", "break_even", "sparse_rows"]

_PASS = "store_sparse"


@dataclass(frozen=True)
class SparseRow:
    """One weight.

    Attributes:
        name: Of the tensor.
        form: "coo", or "bitmap" with the bits of a code.
        zeros: Share of zeros.
        dense_bytes, sparse_bytes: What it took and takes.
        ratio: The latter by the former, as text.
    """

    name: str
    form: str
    zeros: float
    dense_bytes: int
    sparse_bytes: int
    ratio: str


def sparse_rows(manifest: Manifest) -> list[SparseRow]:
    """Return the weights that `store_sparse` changed, the ones that take the most bytes first."""
    rows = [
        SparseRow(
            tensor["name"],
            tensor["form"],
            tensor["zeros"],
            tensor["dense_bytes"],
            tensor["sparse_bytes"],
            ratio_text(tensor["sparse_bytes"], tensor["dense_bytes"]),
        )
        for entry in manifest.passes
        if entry.name == _PASS and not entry.rolled_back
        for tensor in entry.detail.get("tensors", [])
    ]
    return sorted(rows, key=lambda row: -row.sparse_bytes)


def break_even(manifest: Manifest) -> list[tuple[str, float]]:
    """Return the forms with the share of zeros above which each takes fewer bytes than dense values."""
    for entry in manifest.passes:
        if entry.name == _PASS and not entry.rolled_back:
            return list(entry.detail.get("break_even", {}).items())
    return []
