"""Bytes that a coded weight takes in the file, with everything that the target's layout adds to the codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.custom_ops.ops import DOMAIN as OWN_DOMAIN
from onnxslim_llm.custom_ops.packed import PackedScheme
from onnxslim_llm.passes.quantize.codes.planes import is_split, plane_scheme
from onnxslim_llm.products.sites import WeightGroup

if TYPE_CHECKING:
    from onnxslim_llm.targets.base import Target

__all__ = ["Storage", "storage_of", "stored_bytes"]

Storage = Literal["tensors", "nbits", "packed"]
"""How a target stores weights: as tensors of few-bit elements, as MatMulNBits reads them, or as MatMulPacked does."""

#: Bytes of a node and its names, which a weight of two planes needs twice: 200 to 350 in artifacts of exported models.
_NODE_BYTES = 300
_SCALE_BYTES = {"float32": 4, "float16": 2}
#: Widths of ONNX's element types: codes of 3 bits lie in 4.
_ELEMENT_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
#: Widths of tables that only look-ups read and ONNX Runtime's own operator can look up.
_RUNTIME_TABLES = (2, 4, 8)


def storage_of(target: Target | None) -> Storage:
    """Return how a target stores weights."""
    if target is not None and target.needs_operators and OWN_DOMAIN in target.domains:
        return "packed"
    return "nbits" if target is not None and "com.microsoft" in target.domains else "tensors"


def stored_bytes(group: WeightGroup, scheme: WeightScheme, storage: Storage) -> int:
    """Return the bytes of codes, scales, zero points and padding; of two planes, those of the second node, too.

    Args:
        group: The weight, K x N.
        scheme: How it is coded.
        storage: How the target stores it.
    """
    if is_split(scheme):
        return _NODE_BYTES + sum(stored_bytes(group, plane_scheme(scheme, index), storage) for index in (0, 1))
    rows, columns = group.rows, group.columns
    looked_up = group.roles == {"embedding"} and scheme.bits in _RUNTIME_TABLES
    if storage == "packed" and scheme.block and not looked_up:
        return PackedScheme(rows, columns, scheme.bits, scheme.block, scheme.symmetric, scheme.scale_type).size
    blocks = scheme.block_count(rows)
    scales = columns * blocks * _SCALE_BYTES[scheme.scale_type]
    zero_bits = 0 if scheme.symmetric else scheme.bits
    if storage != "tensors" and scheme.block:
        codes = columns * blocks * (scheme.block * scheme.bits // 8)
        return codes + scales + columns * -(-blocks * zero_bits // 8)
    wide = _ELEMENT_BITS[scheme.bits]
    return -(-columns * (rows * wide + (wide if zero_bits else 0) * blocks) // 8) + scales
