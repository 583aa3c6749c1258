"""How a weight is written as entries of tables: how many, of what length, and what scales stand beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxslim_llm.passes.quantize.codebook.books import FixedBook

__all__ = ["BookForm", "BookKind"]

BookKind = Literal[FixedBook, "kmeans", "vectors"]

_ENTRIES = 256
_BITS_OF_CODE = 8
_BITS_OF_VALUE = 16


@dataclass(frozen=True)
class BookForm:
    """The form of a coded weight. Codes are bytes: one for `length` weights along K, in each of `stages` tables.

    Attributes:
        kind: See `QuantizeCodebook.codebook`. Tables of 16 numbers hold pairs: their 256 entries are all pairs.
        length: d, the weights that an entry stands for: 2 for numbers, in pairs.
        stages: Tables whose entries are added: each codes what those before it have left.
        block: Weights along K that share a scale.
    """

    kind: BookKind
    length: int
    stages: int
    block: int

    @property
    def pairs(self) -> bool:
        """Whether the table is made of all pairs of 16 numbers."""
        return self.kind != "vectors"

    def stored_bits(self, rows: int, columns: int) -> float:
        """Return the bits per weight of W[K, N], tables and scales included."""
        codes = self.stages * _BITS_OF_CODE / self.length
        scales = _BITS_OF_VALUE / self.block
        tables = self.stages * _ENTRIES * self.length * _BITS_OF_VALUE / (rows * columns)
        return codes + scales + tables
