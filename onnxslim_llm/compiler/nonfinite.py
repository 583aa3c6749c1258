"""Which stored weights hold NaN or infinity: what comes out of such a model is worth nothing."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights import DerivedWeight, SparseWeight, Weight, weight_of

__all__ = ["NonFinite", "nonfinite_weights"]

#: Element type -> (unsigned integer of its size, bits of the exponent, bits of the mantissa), as IEEE 754 has them.
_LAYOUTS: dict[int, tuple[np.dtype[Any], int, int]] = {
    TensorProto.FLOAT16: (np.dtype("<u2"), 0x7C00, 0x03FF),
    TensorProto.BFLOAT16: (np.dtype("<u2"), 0x7F80, 0x007F),
    TensorProto.FLOAT: (np.dtype("<u4"), 0x7F80_0000, 0x007F_FFFF),
    TensorProto.DOUBLE: (np.dtype("<u8"), 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF),
}


@dataclass(frozen=True)
class NonFinite:
    """Values of a weight that are no numbers to compute with.

    Attributes:
        name: The weight.
        nan: How many are NaN.
        infinite: How many are plus infinity; minus infinity is what attention masks are made of, and not counted.
    """

    name: str
    nan: int
    infinite: int

    def __str__(self) -> str:
        counts = [f"{n} {what}" for n, what in ((self.nan, "NaN"), (self.infinite, "infinite")) if n]
        return f"weight '{self.name}' holds {' and '.join(counts)} values"


def nonfinite_weights(model: Model) -> list[NonFinite]:
    """Return the weights with NaN or plus infinity, in the order of the model; reads all that are stored as floats.

    Weights that are made by recorded work are left out: the work itself refuses what is not finite.
    """
    found = []
    seen: set[Hashable] = set()
    for tensor in model.constants():
        weight = weight_of(tensor)
        skipped = weight.onnx_dtype not in _LAYOUTS or isinstance(weight.storage, DerivedWeight | SparseWeight)
        if not skipped and weight.storage_key not in seen:
            seen.add(weight.storage_key)
            nan, infinite = _count(weight)
            if nan or infinite:
                found.append(NonFinite(tensor.name, nan, infinite))
    return found


def _count(weight: Weight) -> tuple[int, int]:
    unsigned, exponent, mantissa = _LAYOUTS[weight.onnx_dtype]
    nan = infinite = 0
    for start, piece in weight.chunks():
        bits = np.frombuffer(piece, unsigned)
        special = bits[(bits & exponent) == exponent]
        if special.size:
            nan += int(np.count_nonzero(special & mantissa))
            infinite += int(np.count_nonzero(special == exponent))  # the sign's bit is not set
        weight.release(start, start + bits.nbytes)
    return nan, infinite
