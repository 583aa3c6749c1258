"""What each IR version of ONNX brought, as far as it decides what may be written (onnx.proto, enum Version)."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import OperatorSetIdProto, TensorProto, helper

__all__ = [
    "FIRST_IR_WITH_CONSTANTS",
    "FIRST_IR_WITH_FUNCTIONS",
    "FIRST_IR_WITH_OPSETS",
    "ir_version_to_write",
]

FIRST_IR_WITH_OPSETS = 3
"""Models of older IR versions have no opset imports; they are of opset 1."""

FIRST_IR_WITH_CONSTANTS = 4
"""Before, every initializer is listed as a graph input; since then, only those that the caller may override."""

FIRST_IR_WITH_FUNCTIONS = 8

_FIRST_WITH_TYPE: dict[int, int] = {
    TensorProto.BFLOAT16: 4,
    TensorProto.FLOAT8E4M3FN: 9,
    TensorProto.FLOAT8E4M3FNUZ: 9,
    TensorProto.FLOAT8E5M2: 9,
    TensorProto.FLOAT8E5M2FNUZ: 9,
    TensorProto.UINT4: 10,
    TensorProto.INT4: 10,
    TensorProto.FLOAT4E2M1: 11,
    TensorProto.FLOAT8E8M0: 12,
    TensorProto.UINT2: 13,
    TensorProto.INT2: 13,
    TensorProto.FLOAT6E2M3: 14,
    TensorProto.FLOAT6E3M2: 14,
}


def ir_version_to_write(
    version: int, onnx_types: Iterable[int], functions: bool, imports: Iterable[OperatorSetIdProto]
) -> int:
    """Return the IR version of a model: the one it has, raised to what it needs.

    Args:
        version: What it has; 0 for a new model, which gets the one that came with its operator sets.
        onnx_types: Element types of its constants.
        functions: Whether it has model-local functions.
        imports: Its operator sets.
    """
    needed = max((_FIRST_WITH_TYPE.get(number, 1) for number in onnx_types), default=1)
    if functions or not version:
        needed = max(needed, FIRST_IR_WITH_FUNCTIONS)
    if not version:
        needed = max(needed, helper.find_min_ir_version_for(list(imports), ignore_unknown=True))
    return max(needed, version)
