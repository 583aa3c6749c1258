"""Conversion to a newer opset, node by node.

onnx's version converter loses metadata, functions, weights above 2 GiB and the bodies of If and Loop when it is given a
whole model. So it is given one node at a time, and only nodes whose operator changed between the two opsets; what comes
back takes the node's place. Everything else stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import lru_cache

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import defs, version_converter

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.walk import with_subgraphs
from onnxslim_llm.ir.weights import constant, weight_of

__all__ = ["convert_opset"]

_KINDS = defs.OpSchema.AttrType
_ANY_VALUE = {_KINDS.INT: 1, _KINDS.FLOAT: 1.0, _KINDS.INTS: [1], _KINDS.FLOATS: [1.0], _KINDS.STRING: ""}
#: Constants up to this many elements are shown to the converter: axes, shapes and the like decide what it does.
_SHOWN_ELEMENTS = 1024
_STANDARD = (None, "", "ai.onnx")
_TODO = "export the model with the newer opset"

#: What the converter hands on unchanged though its meaning changed: (operator, last old opset, what changed).
_WRONG = (
    ("Upsample", 9, "Resize places its samples differently by default"),
    ("Resize", 10, "it places its samples differently by default"),
    ("Scan", 8, "it has no batch axis any more"),
    ("GroupNormalization", 20, "scale and bias are given per channel, no longer per group"),
)


def convert_opset(model: Model, version: int) -> list[str]:
    """Convert the top graph, its subgraphs and the model-local functions to a newer version of ai.onnx, in place.

    (ONNX Runtime reads a function's body with the model's opset, whatever the function imports.)

    Args:
        model: Its import of ai.onnx is raised to `version`; without one, it is added.
        version: The wanted opset.

    Returns:
        Names of the nodes that were replaced by others.

    Raises:
        UsageError: The installed onnx does not know that opset, or the model's is newer.
        ModelError: A node cannot be converted; it is named.
    """
    old = model.opset() or version
    if version > defs.onnx_opset_version():
        known = defs.onnx_opset_version()
        raise UsageError(f"opset {version} is unknown, the newest known one is {known}", todo="update onnx")
    if version < old:
        raise UsageError(f"the model has opset {old}: it cannot be converted down to {version}")
    changed: list[str] = []
    converter = _Converter(model, old, version)
    if any(converter.may_change(node) for graph in model.graphs() for node in graph.nodes):
        infer_shapes(model)  # some conversions depend on ranks and types
    for graph in list(model.graphs()):
        changed += converter.convert(graph)
    model.set_opset("", version)
    for function in model.functions:
        theirs = int(function.opset)
        if not any(normal_domain(item.domain) == "" for item in function.import_domains or []) or theirs >= version:
            continue
        converter = _Converter(model, theirs, version)
        for graph in list(with_subgraphs(function)):
            changed += converter.convert(graph)
            graph.opset = version
        for item in function.import_domains:
            if normal_domain(item.domain) == "":
                item.version = version
    return changed


def normal_domain(domain: str | None) -> str:
    """Return the domain with all spellings of the standard one (None, "", "ai.onnx") as ""."""
    return "" if domain in _STANDARD else str(domain)


class _Converter:
    """Converts nodes between two opsets; remembers which ones come back as they were."""

    def __init__(self, model: Model, old: int, new: int) -> None:
        self._model, self._old, self._new = model, old, new
        self._unchanged: set[bytes] = set()
        self._kinds: dict[Hashable, bool] = {}

    def convert(self, graph: gs.Graph) -> list[str]:
        """Convert the nodes of one graph in place; return the names of those that others took the place of."""
        changed: list[str] = []
        nodes: list[gs.Node] = []
        for node in graph.nodes:
            name = node.name or node.outputs[0].name
            self._refuse_wrong(node)
            replacement = self._convert(node) if self.may_change(node) else None
            nodes.extend(replacement or [node])
            if replacement:
                changed.append(name)
        graph.nodes[:] = nodes
        return changed

    def _refuse_wrong(self, node: gs.Node) -> None:
        old, new = self._old, self._new
        for op, last, what in _WRONG:
            if node.op == op and node.domain in _STANDARD and old <= last < new:
                raise ModelError(
                    f"{op} cannot be converted from opset {old} to {new}: onnx's converter overlooks that {what}",
                    where=_where(node),
                    todo=_TODO,
                )

    def _convert(self, node: gs.Node) -> list[gs.Node] | None:
        """Return the nodes that take the place of `node`, already connected; None if it can stay as it is."""
        old, new, where = self._old, self._new, _where(node)
        alone, inputs = _isolate(node, old)
        before = alone.to_proto("inline")
        key = before.SerializeToString(deterministic=True)
        if key in self._unchanged:
            return None
        try:
            after = version_converter.convert_version(before, new)
        except Exception as error:  # the converter is C++ and raises what it likes
            reason = str(error).strip().splitlines()[-1][:200]
            raise ModelError(
                f"{node.op} cannot be converted from opset {old} to {new}: {reason}", where=where, todo=_TODO
            ) from error
        if _same(before.graph, after.graph):
            self._unchanged.add(key)
            return None
        if any(isinstance(value, gs.Node.AttributeRef) for value in node.attrs.values()):
            raise ModelError(
                f"{node.op} cannot be converted from opset {old} to {new} where a function sets its attributes",
                where=where,
                todo="inline the function first (inline_functions)",
            )
        return _splice(self._model, node, from_proto(after).graph, inputs)

    def may_change(self, node: gs.Node) -> bool:
        """Return whether the node may need others in its place.

        One without types, shapes and values is tried for all of its kind: what comes back unchanged then needs nothing.
        """
        if not _needs_conversion(node, self._old, self._new):
            return False
        kind = _kind(node)
        if kind is None or any(node.op == op for op, _, _ in _WRONG):
            return True
        if kind not in self._kinds:
            probe = _bare(node, self._old)
            try:
                changed = not _same(probe.graph, version_converter.convert_version(probe, self._new).graph)
            except Exception:  # it depends on what the probe does not say
                changed = True
            self._kinds[kind] = changed
        return self._kinds[kind]


def _kind(node: gs.Node) -> Hashable | None:
    """Return what nodes that are converted alike have in common; None if an attribute is more than a number or text."""
    if not all(isinstance(v, str | int | float | list | tuple) for v in node.attrs.values()):
        return None
    present = tuple(tuple(not t.is_empty() for t in side) for side in (node.inputs, node.outputs))
    return (node.op, present, repr(sorted(node.attrs.items())))


def _bare(node: gs.Node, opset: int) -> onnx.ModelProto:
    """Return a model of a node like this one, with float inputs of unknown shape."""
    sides = [
        [gs.Variable("" if t.is_empty() else f"{name}_{i}", np.dtype(np.float32)) for i, t in enumerate(side)]
        for name, side in (("input", node.inputs), ("output", node.outputs))
    ]
    given, made = ([t for t in side if not t.is_empty()] for side in sides)
    imports = [onnx.OperatorSetIdProto(domain="", version=opset)]
    graph = gs.Graph([gs.Node(node.op, "", dict(node.attrs), *sides)], given, made, opset=opset, import_domains=imports)
    return Model(graph).to_proto("inline")


def _where(node: gs.Node) -> str:
    return f"node '{node.name or node.outputs[0].name}'"


def _needs_conversion(node: gs.Node, old: int, new: int) -> bool:
    if node.domain not in _STANDARD or node.op == "Constant" or not _changed(node.op, old, new):
        return False
    # Of the control flow operators only the accepted types changed; their bodies are graphs of their own.
    return not any(isinstance(value, gs.Graph) for value in node.attrs.values())


@lru_cache(maxsize=4096)
def _changed(op: str, old: int, new: int) -> bool:
    try:
        return bool(defs.get_schema(op, old, "").since_version != defs.get_schema(op, new, "").since_version)
    except defs.SchemaError:  # removed, or never a standard operator: the converter will say
        return defs.has(op)


def _isolate(node: gs.Node, opset: int) -> tuple[Model, dict[str, gs.Tensor]]:
    """Return a model of this node alone, and its inputs by their names there."""
    names: dict[int, gs.Tensor] = {}
    originals: dict[str, gs.Tensor] = {}

    def stand_in(tensor: gs.Tensor) -> gs.Tensor:
        if tensor.is_empty():
            return gs.Variable.empty()
        if id(tensor) not in names:
            name = f"input_{len(names)}"
            originals[name] = tensor
            names[id(tensor)] = _shown(name, tensor)
        return names[id(tensor)]

    inputs = [stand_in(tensor) for tensor in node.inputs]
    outputs = [
        gs.Variable.empty() if t.is_empty() else gs.Variable(f"output_{i}", t.dtype, t.shape)
        for i, t in enumerate(node.outputs)
    ]
    attributes = {name: _placeholder(node.op, name, value, opset) for name, value in node.attrs.items()}
    copy = gs.Node(node.op, "", {k: v for k, v in attributes.items() if v is not None}, inputs, outputs)
    given = [tensor for tensor in names.values() if isinstance(tensor, gs.Variable)]
    graph = gs.Graph(
        [copy],
        given,
        [tensor for tensor in outputs if not tensor.is_empty()],
        opset=opset,
        import_domains=[onnx.OperatorSetIdProto(domain="", version=opset)],
    )
    return Model(graph), originals


def _placeholder(op: str, name: str, value: object, opset: int) -> object:
    """Return an attribute's value; a reference to an attribute of the function becomes any value of its type."""
    if not isinstance(value, gs.Node.AttributeRef):
        return value
    schema = defs.get_schema(op, opset, "")
    kind = schema.attributes[name].type if name in schema.attributes else None
    return None if kind is None else _ANY_VALUE.get(kind)


def _shown(name: str, tensor: gs.Tensor) -> gs.Tensor:
    if isinstance(tensor, gs.Constant):
        weight = weight_of(tensor)
        if math.prod(weight.shape) <= _SHOWN_ELEMENTS:
            return constant(name, weight)
        return gs.Variable(name, weight.dtype, list(weight.shape))
    return gs.Variable(name, tensor.dtype, tensor.shape)


def _same(before: onnx.GraphProto, after: onnx.GraphProto) -> bool:
    if len(after.node) != 1 or len(after.initializer) > len(before.initializer):
        return False
    a, b = before.node[0], after.node[0]
    attributes = [sorted(item.SerializeToString(deterministic=True) for item in n.attribute) for n in (a, b)]
    trimmed = [list(n.input) for n in (a, b)]
    return a.op_type == b.op_type and trimmed[0] == trimmed[1] and attributes[0] == attributes[1]


def _splice(model: Model, node: gs.Node, graph: gs.Graph, inputs: dict[str, gs.Tensor]) -> list[gs.Node]:
    """Connect the converted nodes to the tensors of `node`, which is detached."""
    outer: dict[str, gs.Tensor] = {**inputs}
    for i, tensor in enumerate(node.outputs):
        outer[f"output_{i}"] = tensor
    known: dict[int, gs.Tensor] = {}

    def place(tensor: gs.Tensor) -> gs.Tensor:
        if tensor.is_empty():
            return tensor
        if tensor.name in outer:
            return outer[tensor.name]
        if id(tensor) not in known:
            tensor.name = model.fresh_name(f"{node.outputs[0].name}/{tensor.name}")
            known[id(tensor)] = tensor
        return known[id(tensor)]

    nodes = list(graph.nodes)
    final = outer["output_0"]
    wiring = [([place(t) for t in n.inputs], [place(t) for t in n.outputs]) for n in nodes]
    node.inputs.clear()
    node.outputs.clear()
    for converted, (reads, writes) in zip(nodes, wiring, strict=True):
        converted.inputs.clear()
        converted.outputs.clear()
        converted.inputs.extend(reads)
        converted.outputs.extend(writes)
        if any(tensor is final for tensor in writes):
            converted.name = node.name
            if hasattr(node, "skeleton"):
                converted.skeleton = node.skeleton
        else:
            converted.name = model.fresh_name(f"{node.name or node.op}/{converted.op}")
    return nodes
