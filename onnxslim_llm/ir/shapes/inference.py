"""Shape inference without weights: onnx's own, refined by sizes as expressions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import onnx
import onnx_graphsurgeon as gs
from onnx import shape_inference

from onnxslim_llm.ir.proto.values import read_type
from onnxslim_llm.ir.shapes.dims import Dim
from onnxslim_llm.ir.shapes.symbolic import SymbolicValues, is_named
from onnxslim_llm.ir.weights import weight_of

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["SymbolicValues", "ensure_shapes", "infer_shapes", "shape_of"]

#: onnx's inference names the sizes that it does not know unk__0, unk__1, ...
_UNKNOWN_PREFIX = "unk__"
#: Nodes of inlined functions. Real models have thousands; the time of the inference is some microseconds a node.
_MOST_INLINED = 1_000_000


def ensure_shapes(model: Model) -> None:
    """Run `infer_shapes` if an output of some node has no type or shape yet: after rewrites most have theirs."""
    made = (t for graph in model.graphs() for node in graph.nodes for t in node.outputs if not t.is_empty())
    known = all("derived_shape" in tensor.__dict__ for tensor in model.graph.outputs)
    if not known or any(tensor.dtype is None or tensor.shape is None for tensor in made):
        infer_shapes(model)


def shape_of(tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
    """Return the shape that may be relied on, after `infer_shapes`; None if not even the rank is known.

    For an output of the model it is what was derived, not what the exporter wrote.
    """
    if isinstance(tensor, gs.Constant):
        return weight_of(tensor).shape
    if tensor.type != "tensor_type":
        return None
    shape = tensor.__dict__.get("derived_shape", tensor.shape)
    return None if shape is None else tuple(shape)


def infer_shapes(model: Model) -> SymbolicValues:
    """Fill in missing element types and shapes of the variables, in subgraphs too.

    What the model says is kept: a dimension is only filled in where it is unknown, or where a name becomes a number;
    graph inputs are never changed, nor are outputs that have a type. Sizes are ints, names and sums of products
    of names ("past_sequence_length + sequence_length"), see `dims`. Variables about which the model said nothing are
    marked `inferred`: the writer leaves them out, so that inference does not make a file grow. What is derived for an
    output of the model is kept beside what it declares, see `shape_of`.

    Unknown operators are no error: what depends on them stays unknown.

    Returns:
        What is known beyond that: unnamed sizes and the contents of small integer tensors.
    """
    proto = model.to_proto("omit")
    for output in proto.graph.output:
        _forget_names(output)
    _forget_defaults(proto.graph)
    if _size_inlined(proto) > _MOST_INLINED:
        del proto.functions[:]
    try:
        # Without onnx's propagation of data, which computes whatever it finds, however large; ours is bounded.
        proto = shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=False)
    except (shape_inference.InferenceError, RuntimeError, ValueError) as error:
        model.notes.append(f"onnx's shape inference failed: {str(error).splitlines()[0]}")
    fixed = {id(t) for t in model.graph.inputs}
    fixed |= {id(t) for t in model.graph.outputs if t.dtype is not None}
    _take_over(model.graph, proto.graph, fixed)
    values = SymbolicValues(model)
    for graph in model.graphs():
        for node in graph.nodes:
            for tensor in node.outputs:
                shape = values.shape_of(tensor) if not tensor.is_empty() else None
                if shape is not None and id(tensor) not in fixed:
                    _fill_shape(tensor, tuple(_written(dim) for dim in shape))
    for tensor in model.graph.outputs:
        shape = values.shape_of(tensor)
        tensor.derived_shape = None if shape is None else tuple(_written(dim) for dim in shape)
    return values


def _size_inlined(proto: onnx.ModelProto) -> int:
    """Return the nodes that calls of model-local functions stand for; onnx's inference visits every one of them."""
    bodies = {(function.domain, function.name): function.node for function in proto.functions}
    sizes: dict[tuple[str, str], int] = {}
    for start in bodies:
        stack = [start]
        while stack:  # no recursion: calls may be nested as deep as a file can say
            waiting = [key for key in _called(bodies[stack[-1]]) if key in bodies and key not in sizes]
            if waiting:
                stack += waiting
            else:
                key = stack.pop()
                sizes[key] = len(bodies[key]) + sum(sizes.get(called, 0) for called in _called(bodies[key]))
    return sum(sizes.get(called, 0) for called in _called(proto.graph.node))


def _called(nodes: Iterable[onnx.NodeProto]) -> list[tuple[str, str]]:
    inner = [n for node in nodes for attribute in node.attribute for n in attribute.g.node]
    found = [(node.domain, node.op_type) for node in nodes]
    return [*found, *_called(inner)] if inner else found


def _forget_names(output: onnx.ValueInfoProto) -> None:
    # Exporters write names of sizes into outputs unchecked, and inference would spread them backwards.
    if output.type.WhichOneof("value") == "tensor_type":
        for dim in output.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")


def _forget_defaults(graph: onnx.GraphProto) -> None:
    # onnx's inference takes the default of an input for its value.
    inputs = {entry.name for entry in graph.input}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name in inputs:
            del graph.initializer[i]


def _take_over(graph: gs.Graph, proto: onnx.GraphProto, fixed: set[int]) -> None:
    found = {entry.name: entry for entry in (*proto.value_info, *proto.output)}
    # The writer keeps the order of the nodes.
    for node, written in zip(graph.nodes, proto.node, strict=True):
        for tensor in node.outputs:
            entry = found.get(tensor.name)
            if entry is not None and not tensor.is_empty() and id(tensor) not in fixed:
                _fill(tensor, entry)
        graphs = {attribute.name: attribute.g for attribute in written.attribute if attribute.HasField("g")}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                _take_over(value, graphs[name], fixed)


def _fill(tensor: gs.Variable, entry: onnx.ValueInfoProto) -> None:
    dtype, shape, kind = read_type(entry.type)
    if tensor.type != kind and (tensor.dtype is not None or tensor.shape is not None):
        return
    if tensor.dtype is None and tensor.shape is None:
        if dtype is None and shape is None:
            return
        tensor.inferred = True
        tensor.type = kind
    if tensor.dtype is None:
        tensor.dtype = dtype
    if shape is not None:
        names = tuple(None if isinstance(d, str) and d.startswith(_UNKNOWN_PREFIX) else d for d in shape)
        _fill_shape(tensor, names)


def _fill_shape(tensor: gs.Variable, shape: tuple[int | str | None, ...]) -> None:
    if tensor.shape is None:
        if tensor.dtype is None and "inferred" not in tensor.__dict__:
            tensor.inferred = True
        tensor.shape = list(shape)
        return
    if len(tensor.shape) != len(shape):
        return
    merged = [_better(mine, theirs) for mine, theirs in zip(tensor.shape, shape, strict=True)]
    if merged != list(tensor.shape):
        tensor.shape = merged


def _better(mine: int | str | None, theirs: int | str | None) -> int | str | None:
    if mine is None or mine == "":
        return theirs
    return theirs if isinstance(mine, str) and isinstance(theirs, int) else mine


def _written(dim: Dim) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return str(dim) if is_named(dim) else None
