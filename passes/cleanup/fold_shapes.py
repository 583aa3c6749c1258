"""Shape arithmetic is replaced by constants where sizes are known, or where the operator need not be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.shapes import SymbolicValues, infer_shapes
from onnxslim_llm.ir.shapes.dims import Dim, Expr
from onnxslim_llm.ir.weights import constant
from onnxslim_llm.rewrite.edit import redirect, remove_dead, replace_output
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FoldShapes"]

#: Operators that return their input when its shape does not change (Slice only with positive steps).
_SHAPE_ONLY = frozenset(["Expand", "Flatten", "Reshape", "Slice", "Squeeze", "Tile", "Unsqueeze"])


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Replace shape arithmetic by constants where sizes are known, or need not be said.

    Sizes are followed through Shape, Gather, Slice, Concat, Cast, arithmetic, comparisons and Where as expressions of
    the graph inputs' sizes. A content that turns out to be numbers becomes a constant. A Reshape keeps a size with 0 or
    finds it with -1; an Expand leaves a size alone with 1; one that changes nothing goes. A list of sizes that was
    computed before is not computed again.

    Before:
        agraph (float[B, S, 64] x) => (float[B, S, 8, 8] y)
        <int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[2] heads = {8, 8}>
        {
            shape = Shape (x)
            b = Gather (shape, zero)
            s = Gather (shape, one)
            b1 = Unsqueeze (b, first)
            s1 = Unsqueeze (s, first)
            target = Concat <axis = 0> (b1, s1, heads)
            y = Reshape (x, target)
        }

    After:
        agraph (float[B, S, 64] x) => (float[B, S, 8, 8] y)
        <int64[4] target = {0, 0, 8, 8}>
        {
            y = Reshape (x, target)
        }

    Skips when:
        - more than one size of a Reshape is neither a number nor the size of the same axis of its input
        - -1 would have to stand beside a size that is 0 in ordinary use (an empty cache): it could not be found then
        - an Expand really repeats along an axis by a size that is no number
        - the content is an output of a graph
    """

    name: ClassVar[str] = "fold_shapes"
    group: ClassVar[str] = "cleanup"

    def apply(self, model: Model, context: Context) -> Change:
        """Fold the top graph and its subgraphs."""
        work = _Work(model)
        for graph in list(model.graphs()):
            seen: dict[Any, gs.Tensor] = {}
            for node in graph.nodes:
                if normal_domain(node.domain) == "" and node.op != "Constant":
                    work.visit(node, seen)
        if work.change:
            gone = {id(n) for n in remove_dead((n for g in model.graphs() for n in g.nodes), work.outputs)}
            for graph in model.graphs():
                graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
        return work.change


class _Work:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.values: SymbolicValues = infer_shapes(model)
        self.outputs = graph_output_ids(model)
        self.change = Change()
        for graph in model.graphs():
            for node in graph.nodes:
                node.home = graph

    def visit(self, node: gs.Node, seen: dict[Any, gs.Tensor]) -> None:
        for tensor in list(node.outputs):
            if not tensor.is_empty() and tensor.dtype is not None and self._replace_content(tensor, seen):
                self.change.sites.append(tensor.name)
        if node.op in _SHAPE_ONLY and self._changes_nothing(node):
            output = node.outputs[0]
            if replace_output(output, node.inputs[0], (), self.outputs):
                self.change.sites.append(output.name)
                return
        if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Variable):
            target = None
            if node.op == "Reshape":
                target = self._reshape_target(node)
            elif node.op == "Expand":
                target = self._expand_target(node)
            if isinstance(target, str):
                self.change.skip(node.outputs[0].name, target)
            elif target is not None:
                if node.op == "Reshape" and not _has_literal_zero(self.values.value_of(node.inputs[1])):
                    node.attrs.pop("allowzero", None)
                name = self.model.fresh_name(f"{node.name or node.outputs[0].name}/shape")
                node.inputs[1] = constant(name, np.array(target, np.int64))
                self.change.sites.append(node.outputs[0].name)

    def _replace_content(self, tensor: gs.Variable, seen: dict[Any, gs.Tensor]) -> bool:
        value = self.values.value_of(tensor)
        if value is None or not tensor.outputs or any(item is None for item in value.reshape(-1)):
            return False
        dtype = np.dtype(tensor.dtype)
        if all(isinstance(item, int) for item in value.reshape(-1)):
            array = _as_type(value, dtype)
            if array is None:
                return False  # does not fit the type: the runtime wraps around, or fails
            if id(tensor) in self.outputs:
                self.change.skip(tensor.name, "its content is known, but it is an output of a graph")
                return False
            redirect(tensor, constant(tensor.name, array))
            return True
        key = (dtype, value.shape, tuple(value.reshape(-1)))
        twin = seen.setdefault(key, tensor)
        if twin is tensor or id(tensor) in self.outputs:
            return False
        redirect(tensor, twin)
        return True

    def _changes_nothing(self, node: gs.Node) -> bool:
        before, after = self.values.shape_of(node.inputs[0]), self.values.shape_of(node.outputs[0])
        if before is None or before != after:
            return False
        if node.op == "Slice" and len(node.inputs) > 4 and not node.inputs[4].is_empty():
            steps = self.values.known_value(node.inputs[4])
            return steps is not None and bool(np.all(steps > 0))
        return True

    def _reshape_target(self, node: gs.Node) -> list[int] | str:
        wanted, after = self.values.value_of(node.inputs[1]), self.values.shape_of(node.outputs[0])
        before = self.values.shape_of(node.inputs[0])
        if wanted is None or after is None or before is None or wanted.size != len(after):
            return "nothing is known about the sizes that it asks for"
        # Only a literal zero needs allowzero; a size that is copied may be zero without it.
        copies = not (_has_literal_zero(wanted) and int(node.attrs.get("allowzero", 0)))
        target: list[int] = []
        for i, (item, size) in enumerate(zip(wanted, after, strict=True)):
            if isinstance(item, int) and item > 0:
                target.append(item)
            elif isinstance(size, int) and (size > 0 or not copies):
                target.append(size)
            elif (copies and i < len(before) and before[i] == size) or (isinstance(item, int) and item == 0):
                target.append(0)
            else:
                target.append(-1)
        free = [i for i, size in enumerate(target) if size == -1]
        if len(free) > 1:
            return f"{len(free)} of its sizes are not known"
        if free and wanted[free[0]] != -1:
            others = [size for i, size in enumerate(after) if i != free[0]]
            if any(self._may_be_zero(size) for size in others):
                return "a size that may be 0 stands beside the one that -1 would have to find"
        return target

    def _may_be_zero(self, size: Dim) -> bool:
        if not isinstance(size, Expr):
            return size == 0
        return all(any(name in self.values.may_be_empty for name in monomial) for monomial, _ in size.terms)

    def _expand_target(self, node: gs.Node) -> list[int] | str:
        wanted, before = self.values.value_of(node.inputs[1]), self.values.shape_of(node.inputs[0])
        if wanted is None or before is None:
            return "nothing is known about the sizes that it asks for"
        target: list[int] = []
        for axis in range(-wanted.size, 0):
            item = wanted[axis]
            if item is not None and -axis <= len(before) and before[axis] == item:
                target.append(1)
            elif isinstance(item, int):
                target.append(item)
            else:
                return "it repeats by a size that is not known"
        return target


def _has_literal_zero(value: NDArray[Any] | None) -> bool:
    return value is not None and any(isinstance(item, int) and item == 0 for item in value.reshape(-1))


def _as_type(value: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    if dtype.kind == "b":
        return value.astype(bool)
    if dtype.kind not in "iu":
        return None
    limits = np.iinfo(dtype)
    return value.astype(dtype) if all(limits.min <= item <= limits.max for item in value.reshape(-1)) else None
