"""Conversion to a newer opset, node by node.

onnx's version converter loses metadata, functions, weights above 2 GiB and the bodies of If and Loop when it is given a
whole model. So it is given one node at a time, and only nodes whose operator changed between the two opsets; what comes
back takes the node's place. Everything else stays as it was.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import defs, version_converter

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import constant, weight_of

__all__ = ["convert_opset"]

#: Constants up to this many elements are shown to the converter: axes, shapes and the like decide what it does.
_SHOWN_ELEMENTS = 1024
_STANDARD = (None, "", "ai.onnx")


def convert_opset(model: Model, version: int) -> list[str]:
    """Convert the top graph and its subgraphs to a newer version of ai.onnx, in place.

    Model-local functions import their own opset and stay as they are.

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
    touched = [n for g in model.graphs() for n in g.nodes if _needs_conversion(n, old, version)]
    if touched:
        infer_shapes(model)  # some conversions depend on ranks and types
    wanted = {id(node) for node in touched}
    for graph in list(model.graphs()):
        nodes: list[gs.Node] = []
        for node in graph.nodes:
            replacement = _convert(model, node, old, version) if id(node) in wanted else None
            nodes.extend(replacement or [node])
            if replacement:
                changed.append(node.name or replacement[-1].outputs[0].name)
        graph.nodes[:] = nodes
    model.set_opset("", version)
    return changed


def _needs_conversion(node: gs.Node, old: int, new: int) -> bool:
    if node.domain not in _STANDARD or not _changed(node.op, old, new):
        return False
    # Of the control flow operators only the accepted types changed; their bodies are graphs of their own.
    return not any(isinstance(value, gs.Graph) for value in node.attrs.values())


@lru_cache(maxsize=4096)
def _changed(op: str, old: int, new: int) -> bool:
    try:
        return bool(defs.get_schema(op, old, "").since_version != defs.get_schema(op, new, "").since_version)
    except defs.SchemaError:  # removed, or never a standard operator: the converter will say
        return defs.has(op)


def _convert(model: Model, node: gs.Node, old: int, new: int) -> list[gs.Node] | None:
    """Return the nodes that take the place of `node`, already connected; None if it can stay as it is."""
    if not _changes(_probe(node, old), new):
        return None
    alone, inputs = _isolate(node, old)
    before = alone.to_proto("inline")
    try:
        after = version_converter.convert_version(before, new)
    except Exception as error:  # the converter is C++ and raises what it likes
        reason = str(error).strip().splitlines()[-1][:200]
        raise ModelError(
            f"{node.op} cannot be converted from opset {old} to {new}: {reason}",
            where=f"node '{node.name or node.outputs[0].name}'",
            todo="export the model with the newer opset",
        ) from error
    if _same(before.graph, after.graph):
        return None
    return _splice(model, node, from_proto(after).graph, inputs)


def _probe(node: gs.Node, opset: int) -> bytes:
    """Return the node as a model that is the same for all nodes of its kind: no names, types, shapes and values."""
    names = [gs.Variable("" if t.is_empty() else f"input_{i}") for i, t in enumerate(node.inputs)]
    outputs = [gs.Variable("" if t.is_empty() else f"output_{i}") for i, t in enumerate(node.outputs)]
    imports = [onnx.OperatorSetIdProto(domain="", version=opset)]
    kind = gs.Node(node.op, "", dict(node.attrs), names, outputs)
    given, made = ([t for t in side if not t.is_empty()] for side in (names, outputs))
    for tensor in (*given, *made):
        tensor.dtype = np.dtype(np.float32)
    model = Model(gs.Graph([kind], given, made, opset=opset, import_domains=imports))
    return model.to_proto("inline").SerializeToString(deterministic=True)


@lru_cache(maxsize=1024)
def _changes(probe: bytes, new: int) -> bool:
    """Return whether conversion may change such a node: where it depends on values or shapes, it may."""
    before = onnx.ModelProto.FromString(probe)
    try:
        return not _same(before.graph, version_converter.convert_version(before, new).graph)
    except Exception:
        return True


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
    copy = gs.Node(node.op, node.name, dict(node.attrs), inputs, outputs)
    given = [tensor for tensor in names.values() if isinstance(tensor, gs.Variable)]
    graph = gs.Graph(
        [copy],
        given,
        [tensor for tensor in outputs if not tensor.is_empty()],
        opset=opset,
        import_domains=[onnx.OperatorSetIdProto(domain="", version=opset)],
    )
    return Model(graph), originals


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
