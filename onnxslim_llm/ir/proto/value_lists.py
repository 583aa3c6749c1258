"""The lists of values of a graph (inputs, outputs, value_info, quantization annotations), in the order they came in."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Literal

import onnx
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.proto.skeleton import GraphSkeleton
from onnxslim_llm.ir.proto.values import assign, write_value
from onnxslim_llm.ir.proto.versions import FIRST_IR_WITH_CONSTANTS

__all__ = ["Listing", "alive_ids", "listing_of", "write_values"]

Listing = Literal["as read", "overridable", "all"]
"""Which initializers are listed among the inputs: those that were; of them only the overridable ones; new ones too."""


def listing_of(ir_version: int) -> Listing:
    """Return which initializers a top graph lists in an IR version."""
    return "overridable" if ir_version >= FIRST_IR_WITH_CONSTANTS else "all"


def write_values(
    out: onnx.GraphProto,
    graph: gs.Graph,
    skeleton: GraphSkeleton | None,
    constants: list[gs.Constant],
    listing: Listing,
) -> None:
    """Fill the lists of values of a graph; entries of tensors that are gone are left out."""
    stored = {id(constant) for constant in constants}
    listed_constants = {id(item) for item in constants if listing != "overridable" or is_overridable(item)}
    for tensor, entry in _inputs_in_order(graph, skeleton, listed_constants):
        write_value(out.input.add(), tensor, "input", entry)
    if listing == "all":
        old = set() if skeleton is None else {id(item) for item in skeleton.initializers}
        for constant in constants:
            if id(constant) not in old:
                write_value(out.input.add(), constant, "input")
    # One tensor may be several outputs, with different entries.
    outputs: dict[int, deque[onnx.ValueInfoProto]] = defaultdict(deque)
    for entry, tensor in [] if skeleton is None else skeleton.outputs:
        outputs[id(tensor)].append(entry)
    for tensor in graph.outputs:
        entries = outputs[id(tensor)]
        write_value(out.output.add(), tensor, "output", entries.popleft() if entries else None)
    alive = alive_ids(graph, constants)
    listed = {id(tensor) for tensor in graph.inputs} | {id(tensor) for tensor in graph.outputs}
    if skeleton is not None:
        for entry, tensor in skeleton.value_info:
            if tensor is None:
                out.value_info.add().CopyFrom(entry)
            elif id(tensor) in alive and (isinstance(tensor, gs.Variable) or id(tensor) in stored):
                write_value(out.value_info.add(), tensor, "info", entry)
                listed.add(id(tensor))
        for annotation, tensors in skeleton.annotations:
            _write_annotation(out, annotation, tensors, alive)
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name and id(tensor) not in listed and isinstance(tensor, gs.Variable):
                known = tensor.dtype is not None or tensor.shape is not None
                if known and "inferred" not in tensor.__dict__:  # what inference found can be found again
                    write_value(out.value_info.add(), tensor, "info")
                listed.add(id(tensor))


def _inputs_in_order(
    graph: gs.Graph, skeleton: GraphSkeleton | None, stored: set[int]
) -> Iterable[tuple[gs.Tensor, onnx.ValueInfoProto | None]]:
    # Initializers that were listed as inputs follow the input that they followed before.
    after: dict[int | None, list[tuple[gs.Tensor, onnx.ValueInfoProto]]] = {}
    present = {id(tensor) for tensor in graph.inputs}
    previous: int | None = None
    for entry, tensor in [] if skeleton is None else skeleton.inputs:
        if id(tensor) in present:
            previous = id(tensor)
        elif id(tensor) in stored:
            after.setdefault(previous, []).append((tensor, entry))
    yield from after.get(None, [])
    for tensor in graph.inputs:
        yield tensor, None
        yield from after.get(id(tensor), [])


def _write_annotation(
    out: onnx.GraphProto, annotation: onnx.TensorAnnotation, tensors: dict[str, gs.Tensor], alive: set[int]
) -> None:
    subject = tensors.get(annotation.tensor_name)
    if subject is not None and id(subject) not in alive:
        return
    written = out.quantization_annotation.add()
    written.CopyFrom(annotation)
    if subject is not None:
        assign(written, "tensor_name", subject.name)
    for item in written.quant_parameter_tensor_names:
        parameter = tensors.get(item.value)
        if parameter is not None:
            assign(item, "value", parameter.name)


def alive_ids(graph: gs.Graph, constants: list[gs.Constant]) -> set[int]:
    """Return the `id`s of the tensors that a graph itself uses or declares."""
    alive = {id(tensor) for tensor in (*graph.inputs, *graph.outputs, *constants)}
    for node in graph.nodes:
        alive.update(map(id, node.inputs))
        alive.update(map(id, node.outputs))
    return alive
