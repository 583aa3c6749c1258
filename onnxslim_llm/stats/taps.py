"""Where a model is listened to: the distinct inputs of its products with weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx

__all__ = ["Tap", "find_taps", "product_outputs"]

#: Operators that only change type, place or name of a weight on its way to the product.
_CARRIERS = frozenset(["Identity", "Cast", "Transpose"])


@dataclass
class Tap:
    """A tensor that enters one or more products with weights.

    Attributes:
        tensor: Its name, X[..., K].
        size: K.
        weights: Names of the initializers that it is multiplied with, in graph order.
        position: Of the first reading node in the graph.
    """

    tensor: str
    size: int
    position: int
    weights: list[str] = field(default_factory=list)


def find_taps(graph: onnx.GraphProto) -> list[Tap]:
    """Return the distinct inputs of MatMul and Gemm nodes whose other operand is a matrix of weights, in graph order.

    Args:
        graph: The top graph; what subgraphs do is not seen.
    """
    taps: dict[str, Tap] = {}
    for position, (node, weight, rows) in enumerate(_products(graph, _matrices(graph))):
        if weight is not None:
            tap = taps.setdefault(node.input[0], Tap(node.input[0], rows, position))
            if weight not in tap.weights:
                tap.weights.append(weight)
    return list(taps.values())


def product_outputs(graph: onnx.GraphProto) -> dict[str, str]:
    """Return the tensor that each weight's (first) product makes, by the weight's name."""
    found: dict[str, str] = {}
    for node, weight, _ in _products(graph, _matrices(graph)):
        if weight is not None:
            found.setdefault(weight, node.output[0])
    return found


def _matrices(graph: onnx.GraphProto) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the weight behind each tensor that is one, and the shape in which the tensor has it."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    origin: dict[str, tuple[str, tuple[int, ...]]] = {n: (n, shape) for n, shape in shapes.items() if len(shape) == 2}
    for node in graph.node:
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if value is not None and len(value.dims) == 2:
                origin[node.output[0]] = (node.output[0], tuple(value.dims))
        elif node.op_type in _CARRIERS and node.input and node.input[0] in origin:
            name, shape = origin[node.input[0]]
            turned = node.op_type == "Transpose"
            origin[node.output[0]] = (name, shape[::-1] if turned else shape)
    return origin


def _products(
    graph: onnx.GraphProto, origin: dict[str, tuple[str, tuple[int, ...]]]
) -> Iterator[tuple[onnx.NodeProto, str | None, int]]:
    """Yield every node, the weight that it multiplies with (None if it does not), and K."""
    for node in graph.node:
        found: str | None = None
        rows = 0
        if node.domain in ("", "ai.onnx") and len(node.input) > 1 and node.input[1] in origin:
            name, shape = origin[node.input[1]]
            attributes = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
            plain = node.op_type == "MatMul"
            gemm = node.op_type == "Gemm" and not attributes.get("transA", 0)
            if (plain or gemm) and node.input[0] not in origin:
                found, rows = name, shape[1] if attributes.get("transB", 0) else shape[0]
        yield node, found, rows
