"""What the ONNX standard says about an operator: attribute defaults, formal input names, commutativity.

Exporters spell out a default attribute or leave it away; a rule must not care, so comparisons go through here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import onnx
from onnx import defs, helper

__all__ = ["COMMUTATIVE", "attribute_default", "has_attribute", "input_index", "normal_domain", "schema_of"]

#: Operators whose two inputs may be exchanged.
COMMUTATIVE = frozenset(
    {"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal", "Sum", "Mean", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}
)


def normal_domain(domain: str | None) -> str:
    """Return `domain` with the three spellings of the standard domain (None, "", "ai.onnx") made one."""
    return "" if domain in (None, "", "ai.onnx") else str(domain)


@lru_cache(maxsize=4096)
def schema_of(op: str, domain: str, opset: int) -> defs.OpSchema | None:
    """Return the schema in force at `opset`, or None for an operator that the installed onnx does not know."""
    try:
        return defs.get_schema(op, opset, normal_domain(domain))
    except defs.SchemaError:
        return None


@lru_cache(maxsize=4096)
def attribute_default(op: str, domain: str, opset: int, attribute: str) -> Any:
    """Return the default value of an attribute, or None where the schema has none."""
    schema = schema_of(op, domain, opset)
    if schema is None or attribute not in schema.attributes:
        return None
    value = schema.attributes[attribute].default_value
    if not isinstance(value, onnx.AttributeProto) or value.type == onnx.AttributeProto.UNDEFINED:
        return None
    python = helper.get_attribute_value(value)
    return python.decode() if isinstance(python, bytes) else python


@lru_cache(maxsize=4096)
def has_attribute(op: str, domain: str, opset: int, attribute: str) -> bool:
    """Return whether the operator has this attribute at this opset (ReduceMean's axes moved to an input, say)."""
    schema = schema_of(op, domain, opset)
    return schema is not None and attribute in schema.attributes


@lru_cache(maxsize=4096)
def input_index(op: str, domain: str, opset: int, name: str) -> int | None:
    """Return the position of the formal input `name`, or None."""
    schema = schema_of(op, domain, opset)
    if schema is None:
        return None
    return next((i for i, formal in enumerate(schema.inputs) if formal.name == name), None)
