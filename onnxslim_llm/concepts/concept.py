"""Concepts: operators of the compiler's own domain, each with its meaning as a model-local function of plain ai.onnx.

A pass that recognises or makes something for which targets have operators of their own (a matrix product with 4-bit
weights, say) puts one call there. The function body makes the model run in any runtime between any two passes; lowering
replaces the call by what the target likes best, or by the body itself. No call is left in an artifact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs
from onnx import parser

from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.ir.proto.external import ExternalFiles
from onnxslim_llm.ir.proto.reader import read_function
from onnxslim_llm.ir.proto.tensors import TensorReader
from onnxslim_llm.rewrite.edit import Builder, detach, inherit_metadata

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["DOMAIN", "Concept", "calls", "drop_unused_functions", "follow_opset", "inline_call", "replace_nodes"]

#: Domain of all concepts; never found in an artifact.
DOMAIN = "onnxslim_llm"
_VERSION = 1


@dataclass(frozen=True)
class Concept:
    """An operator with a function body.

    Attributes:
        name: The operator.
        signature: Attributes, inputs and outputs, and the body, in the ONNX text syntax:
            ``(X, Y) => (Z) { Z = Add (X, Y) }``, with ``<alpha>`` in front for attributes.
        min_opset: The ai.onnx version that the body needs. ONNX Runtime does not convert function bodies: the *model*
            must have this opset when the concept is used.
    """

    name: str
    signature: str
    min_opset: int

    def call(
        self,
        model: Model,
        name: str,
        inputs: Sequence[gs.Tensor | None],
        outputs: Sequence[gs.Variable],
        attributes: Mapping[str, Any],
    ) -> gs.Node:
        """Return a node that calls the concept; the function is added to the model if it is not there yet.

        Args:
            model: The model whose graph the node is for; the caller puts it there.
            name: Name of the node.
            inputs: None stands for an optional input that is left out.
            outputs: Tensors that the node makes.
            attributes: A value for every attribute of the function.

        Raises:
            CompilerBug: The model's opset is too old.
        """
        self._define(model)
        tensors = [gs.Variable.empty() if tensor is None else tensor for tensor in inputs]
        return gs.Node(self.name, name, dict(attributes), tensors, list(outputs), DOMAIN)

    def build(self, op: Builder, *inputs: Any, **attributes: Any) -> gs.Variable:
        """Add a call with one output to what a rule builds, and return the output; otherwise like `call`."""
        self._define(op.model)
        output: gs.Variable = op.call(DOMAIN, self.name, *inputs, **attributes)
        return output

    def is_call(self, node: gs.Node) -> bool:
        """Return whether `node` calls this concept."""
        return bool(node.domain == DOMAIN and node.op == self.name)

    def _define(self, model: Model) -> None:
        opset = model.opset() or 0
        if opset < self.min_opset:
            what = f"concept {self.name} needs opset {self.min_opset}, the model has {opset}"
            raise CompilerBug(what, where=self.name, todo="convert the model first")
        if any(function.domain == DOMAIN and function.name == self.name for function in model.functions):
            return
        text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{self.name} {self.signature}'
        function = read_function(parser.parse_function(text), TensorReader(ExternalFiles(None)))
        function.opset = opset
        function._functions = model.functions
        model.functions.append(function)
        model.set_opset(DOMAIN, _VERSION)


def follow_opset(model: Model) -> None:
    """Let the functions of all concepts import the model's own ai.onnx version, after it was converted."""
    for function in model.functions:
        if function.domain == DOMAIN:
            function.opset = model.opset()
            for item in function.import_domains:
                item.version = model.opset()


def calls(model: Model, *concepts: Concept) -> Iterator[tuple[gs.Graph, gs.Node]]:
    """Yield (graph, node) for every call of these concepts (default: any) in the model's graphs and subgraphs."""
    for graph in model.graphs():
        for node in graph.nodes:
            if node.domain == DOMAIN and (not concepts or any(c.is_call(node) for c in concepts)):
                yield graph, node


def inline_call(model: Model, node: gs.Node) -> list[gs.Node]:
    """Return the body of the function that `node` calls, connected to the node's tensors; `node` is detached.

    Inputs that are left out are left out in the body. Its nodes are named after the call's first result, which is there
    before and after: a model that is compiled again gets the same names again.

    Raises:
        CompilerBug: The model has no such function.
    """
    function = next((f for f in model.functions if f.domain == node.domain and f.name == node.op), None)
    if function is None:
        raise CompilerBug(f"there is no function {node.domain}::{node.op}", where=node.name)
    inputs, outputs, attributes = list(node.inputs), list(node.outputs), dict(node.attrs)
    tensors: dict[int, gs.Tensor] = {}
    for formal, actual in zip(function.inputs, [*inputs, *[gs.Variable.empty()] * len(function.inputs)], strict=False):
        tensors[id(formal)] = actual
    for formal, actual in zip(function.outputs, outputs, strict=False):
        tensors[id(formal)] = actual
    detach(node)
    body = []
    free = node.name  # the call's own name is free from now on
    for inner in function.nodes:
        name = f"{outputs[0].name}/{inner.op}"
        name, free = (name, "") if name == free else (model.fresh_name(name), free)
        made = [_tensor(model, t, tensors, f"{name}_output_{i}") for i, t in enumerate(inner.outputs)]
        read = [_tensor(model, t, tensors, name) for t in inner.inputs]
        while read and read[-1].is_empty():
            read.pop()
        body.append(gs.Node(inner.op, name, _resolve(inner.attrs, attributes), read, made, inner.domain))
    for inner in body:
        if free and any(tensor is outputs[0] for tensor in inner.outputs):
            inner.name = free  # what makes the result keeps the name
    return body


def _tensor(model: Model, tensor: gs.Tensor, known: dict[int, gs.Tensor], hint: str) -> gs.Tensor:
    if tensor.is_empty():
        return gs.Variable.empty()
    if id(tensor) not in known:
        known[id(tensor)] = gs.Variable(model.fresh_name(hint))
    return known[id(tensor)]


def _resolve(attrs: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    resolved = {}
    for name, value in attrs.items():
        if isinstance(value, gs.Node.AttributeRef):
            if value.name not in values:
                continue
            value = values[value.name]
        resolved[name] = value
    return resolved


def replace_nodes(model: Model, replacements: Mapping[int, Sequence[gs.Node]]) -> None:
    """Put new nodes where old ones were, in all graphs and subgraphs; the last of them inherits the metadata.

    Args:
        model: The model.
        replacements: `id` of an old node -> its successors, in order. The old nodes are detached already; keep them
            alive until this returns, so that the ids stay theirs.
    """
    if not replacements:
        return
    for graph in list(model.graphs()):
        if any(id(node) in replacements for node in graph.nodes):
            graph.nodes[:] = list(_spliced(graph.nodes, replacements))


def _spliced(nodes: Iterable[gs.Node], replacements: Mapping[int, Sequence[gs.Node]]) -> Iterator[gs.Node]:
    for node in nodes:
        if id(node) in replacements:
            successors = replacements[id(node)]
            if successors and successors[-1].outputs:
                inherit_metadata(node, successors[-1].outputs[0])
            yield from successors
        else:
            yield node


def drop_unused_functions(model: Model) -> list[str]:
    """Remove the concepts that nothing calls any more, and the import of their domain with the last one.

    Returns:
        The names of the removed functions.
    """
    called = {node.op for graph in model.all_graphs() for node in graph.nodes if node.domain == DOMAIN}
    unused = [f for f in model.functions if f.domain == DOMAIN and f.name not in called]
    gone = {id(function) for function in unused}
    model.functions[:] = [function for function in model.functions if id(function) not in gone]
    if not any(function.domain == DOMAIN for function in model.functions):
        imports = model.graph.import_domains
        imports[:] = [item for item in imports if item.domain != DOMAIN]
    return [function.name for function in unused]
