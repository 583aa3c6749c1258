"""Where codes are in weights of our operators that are stored sparse."""

from __future__ import annotations

from onnxslim_llm.custom_ops import available, sparse, sparse_kernels
from onnxslim_llm.ir.weights import ArrayWeight
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.lower.stored.stored_sources import Columns, PackedSource

__all__ = ["SparsePackedSource", "packed_source"]


class SparsePackedSource(PackedSource):
    """The weight of MatMulPacked as a bitmap and codes, or one half of one that is packed for a gate.

    It is expanded as a whole whenever columns are read: strips begin where the bytes before them end.

    Args:
        weight: uint8 [bytes].
        half: 0 or 1 where the columns are paired.

    Raises:
        ValueError: The bytes are no sparse packed weight, or scales are of a type that concepts do not have.
    """

    def __init__(self, weight: Weight, half: int = 0) -> None:
        super().__init__(_expanded(weight), half)
        self.weights, self._sparse = (weight,), weight

    @property
    def described(self) -> str:
        """Return which half it is; the rest is in the bytes."""
        return f"sparse v{sparse.VERSION} {super().described}"

    def read(self, first: int, last: int) -> Columns:
        """Return the columns, put back into the order of MatMulNBits."""
        return PackedSource(_expanded(self._sparse), self.half).read(first, last)

    def touched(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return all of it."""
        return [(0, 0, self._sparse.nbytes)]


def packed_source(weight: Weight, half: int = 0) -> PackedSource:
    """Return the source for a weight of MatMulPacked, in whatever form it is stored.

    Raises:
        ValueError: It is of neither form.
    """
    kind = SparsePackedSource if sparse.is_sparse(weight.view()[: len(sparse.MAGIC)]) else PackedSource
    return kind(weight, half)


def _expanded(weight: Weight) -> ArrayWeight:
    data = weight.view()
    return ArrayWeight(sparse_kernels.expand(data) if available() else sparse.expand(data))
