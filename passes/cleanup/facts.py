"""What the rules of this group ask about tensors: shapes and types as inference has written them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.facts import same_shape
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.rule import Refusal

__all__ = ["constant_ints", "is_dropin", "shape_of", "widens"]


def is_dropin(match: Match, name: str) -> Refusal | None:
    """Refuse unless the wildcard `name` has the shape of the root's output, however the operands are broadcast."""
    kept = match[name]
    others = [t for t in match.root.inputs if t is not kept and not t.is_empty()]
    if all(_broadcasts_into(t, kept) for t in others) or same_shape(kept, match.outputs[0]):
        return None
    return Refusal("another operand may broadcast it", match.outputs[0].name)


def _broadcasts_into(tensor: gs.Tensor, kept: gs.Tensor) -> bool:
    """Return whether broadcasting the two surely gives the shape of `kept`."""
    small, large = shape_of(tensor), shape_of(kept)
    if small == ():
        return True
    if small is None or large is None or len(small) > len(large):
        return False
    pairs = zip(reversed(small), reversed(large), strict=False)
    return all(mine == 1 or (mine is not None and mine != "" and mine == theirs) for mine, theirs in pairs)


def constant_ints(tensor: gs.Tensor) -> list[int] | None:
    """Return the content of a small integer constant as a list, or None."""
    value = constant_value(tensor)
    return None if value is None or value.dtype.kind not in "iu" else [int(v) for v in np.reshape(value, -1)]


_FLOAT_BITS: dict[int, tuple[int, int]] = {  # (exponent, mantissa) bits
    TensorProto.BFLOAT16: (8, 7),
    TensorProto.FLOAT16: (5, 10),
    TensorProto.FLOAT: (8, 23),
    TensorProto.DOUBLE: (11, 52),
}
_INTEGER_BITS: dict[int, tuple[bool, int]] = {  # (is signed, bits of magnitude)
    TensorProto.BOOL: (False, 1),
    TensorProto.UINT8: (False, 8),
    TensorProto.INT8: (True, 7),
    TensorProto.UINT16: (False, 16),
    TensorProto.INT16: (True, 15),
    TensorProto.UINT32: (False, 32),
    TensorProto.INT32: (True, 31),
    TensorProto.UINT64: (False, 64),
    TensorProto.INT64: (True, 63),
}


def widens(source: int, through: int) -> bool:
    """Return whether every value of the element type `source` exists in `through`, within the same kind of number."""
    if source == through:
        return True
    if source in _FLOAT_BITS and through in _FLOAT_BITS:
        return all(a <= b for a, b in zip(_FLOAT_BITS[source], _FLOAT_BITS[through], strict=True))
    if source in _INTEGER_BITS and through in _INTEGER_BITS and through != TensorProto.BOOL:
        (signed, bits), (also_signed, more) = _INTEGER_BITS[source], _INTEGER_BITS[through]
        return bits <= more and (also_signed or not signed)
    return False
