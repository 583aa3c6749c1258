"""Shapes and small integer contents as expressions of the input sizes.

onnx's own inference gives up on sums of sizes (a KV cache grows from `past` to `past + sequence`), on Expand and Where,
and so on everything behind them; this walks the graph once with `Dim` arithmetic and keeps such sizes apart or equal.
What it says holds for every run that the model survives: sizes are integers >= 0, and a Reshape target that is written
as a size means that size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.shapes.dims import Dim, Expr, parse, symbol
from onnxslim_llm.ir.shapes.node_view import NodeView
from onnxslim_llm.ir.shapes.shape_rules import SHAPE_RULES
from onnxslim_llm.ir.shapes.value_rules import VALUE_RULES
from onnxslim_llm.ir.weights import weight_of

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["MAX_VALUE_ELEMENTS", "UNKNOWN", "SymbolicValues", "is_named"]

#: Integer tensors with more elements are data, not shapes.
MAX_VALUE_ELEMENTS = 256

#: First letter of the symbols that stand for sizes which nothing names.
UNKNOWN = "?"

Shape = tuple[Dim, ...]
Value = NDArray[Any]


def is_named(dim: Dim) -> bool:
    """Return whether a dimension is a number or made of names that the model gave, and so may be written to it."""
    return isinstance(dim, int) or not any(UNKNOWN in name for monomial, _ in dim.terms for name in monomial)


class SymbolicValues:
    """What is known about the tensors of a model as it is now; changes made to the model later are not followed.

    Args:
        model: The model. Its own shape annotations are used where nothing better can be derived; names in the
            annotations of graph outputs are not, because exporters write them without checking.

    Attributes:
        may_be_empty: Symbols of sizes that are 0 in ordinary use: graph inputs are concatenated along them (KV caches).
    """

    def __init__(self, model: Model) -> None:
        self._shapes: dict[int, Shape | None] = {}
        self._values: dict[int, Value | None] = {}
        self._tensors: dict[int, gs.Tensor] = {}  # keeps them alive, so that their ids stay theirs
        self.may_be_empty: set[str] = set()
        inputs = {id(t) for t in model.graph.inputs}
        outputs = {id(t) for t in model.graph.outputs}
        for tensor in model.graph.inputs:
            self._remember(tensor, self._declared(tensor, names=True), None)
        self._walk(model.graph, outputs, top=True)
        self._find_caches(model.graph, inputs)

    def shape_of(self, tensor: gs.Tensor) -> Shape | None:
        """Return the shape, every dimension an int or an expression; None if not even the rank is known."""
        if id(tensor) not in self._shapes and isinstance(tensor, gs.Constant):
            return tuple(int(d) for d in weight_of(tensor).shape)
        return self._shapes.get(id(tensor))

    def value_of(self, tensor: gs.Tensor) -> Value | None:
        """Return the content of a small integer or boolean tensor, or None.

        Returns:
            An object array of the tensor's shape with an int, bool, `Expr`, or None (unknown) in each place.
        """
        if isinstance(tensor, gs.Constant):
            return self._constant(tensor)
        return self._values.get(id(tensor))

    def known_value(self, tensor: gs.Tensor) -> Value | None:
        """Return the content if every element is known to be a number, or None."""
        value = self.value_of(tensor)
        if value is None or not all(isinstance(item, int) for item in value.reshape(-1)):
            return None
        return value

    def _constant(self, tensor: gs.Constant) -> Value | None:
        if id(tensor) not in self._values:
            weight = weight_of(tensor)
            kind = weight.dtype.kind if isinstance(weight.dtype, np.dtype) else ""
            small = weight.size <= MAX_VALUE_ELEMENTS and kind in ("i", "u", "b") and not is_overridable(tensor)
            self._tensors[id(tensor)] = tensor
            self._values[id(tensor)] = weight.view().astype(object) if small else None
        return self._values[id(tensor)]

    def _remember(self, tensor: gs.Tensor, shape: Iterable[Dim | None] | None, value: Value | None) -> None:
        known = None
        if shape is not None:
            known = tuple(
                symbol(f"{UNKNOWN}{tensor.name}:{axis}") if dim is None else dim for axis, dim in enumerate(shape)
            )
        self._tensors[id(tensor)] = tensor
        self._shapes[id(tensor)] = known
        self._values[id(tensor)] = value

    @staticmethod
    def _declared(tensor: gs.Tensor, names: bool) -> list[Dim | None] | None:
        if tensor.shape is None or getattr(tensor, "type", "tensor_type") != "tensor_type":
            return None
        dims: list[Dim | None] = []
        for dim in tensor.shape:
            if isinstance(dim, str):
                dims.append(parse(dim) if names and dim else None)
            else:
                dims.append(int(dim) if dim is not None and int(dim) >= 0 else None)
        return dims

    def _walk(self, graph: gs.Graph, outputs: set[int], top: bool) -> None:
        for node in graph.nodes:
            for body in node.subgraphs():
                # Sizes in a loop's body change from one iteration to the next: only numbers are taken over.
                for tensor in body.inputs:
                    self._remember(tensor, self._declared(tensor, names=False), None)
                self._walk(body, {id(t) for t in body.outputs}, top=False)
            view = NodeView(node, self.shape_of, self.value_of)
            try:
                shapes, values = self._infer(view)
            except (ArithmeticError, IndexError, KeyError, TypeError, ValueError):
                shapes, values = [], []  # axes or shapes that do not fit: the node cannot run, and says nothing
            for i, tensor in enumerate(node.outputs):
                if tensor.is_empty():
                    continue
                declared = self._declared(tensor, names=top and id(tensor) not in outputs)
                value = values[i] if i < len(values) else None
                derived = shapes[i] if i < len(shapes) else None
                if value is not None:
                    derived = value.shape
                self._remember(tensor, _merge(derived, declared), value)

    @staticmethod
    def _infer(view: NodeView) -> tuple[list[Any], list[Any]]:
        if view.node.op == "BlockMatMul":  # a concept: a product with codes [K, N]
            return SHAPE_RULES["MatMul"](view), []
        if view.node.domain not in (None, "", "ai.onnx"):
            return [], []
        shape_rule, value_rule = SHAPE_RULES.get(view.node.op), VALUE_RULES.get(view.node.op)
        shapes = shape_rule(view) if shape_rule is not None else []
        values: list[Any] = []
        if value_rule is not None:
            value = value_rule(view)
            values = value if isinstance(value, list) else [value]
            values = [v if v is not None and v.size <= MAX_VALUE_ELEMENTS else None for v in values]
        return list(shapes), values

    def _find_caches(self, graph: gs.Graph, inputs: set[int]) -> None:
        for node in graph.nodes:
            if node.op != "Concat":
                continue
            for tensor in node.inputs:
                shape = self.shape_of(tensor) if id(tensor) in inputs else None
                axis = int(node.attrs.get("axis", 0))
                if shape is not None and -len(shape) <= axis < len(shape):
                    dim = shape[axis]
                    if isinstance(dim, Expr):
                        self.may_be_empty |= {name for monomial, _ in dim.terms for name in monomial}


def _merge(derived: Iterable[Dim | None] | None, declared: list[Dim | None] | None) -> list[Dim | None] | None:
    if derived is None:
        return declared
    dims = list(derived)
    if declared is None or len(declared) != len(dims):
        return dims
    return [theirs if mine is None else mine for mine, theirs in zip(dims, declared, strict=True)]
