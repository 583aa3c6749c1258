"""Calls of model-local functions are replaced by their bodies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs
from onnx import defs

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.copying import copy_nodes
from onnxslim_llm.rewrite.edit import detach, inherit_metadata
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain, schema_of

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["InlineFunctions"]

#: Functions may call functions, but never themselves: a deeper nesting than this is a cycle.
MAX_DEPTH = 64


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replace calls of model-local functions by the functions' bodies.

    New tensors and nodes are named after the call; the functions themselves go when nothing calls them any more.

    Before:
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        agraph (float[N] x) => (float[N] y) {
            y = local.Twice (x)
        }
        <domain: "local", opset_import: ["" : 17]>
        Twice (a) => (b) {
            b = Add (a, a)
        }

    After:
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        agraph (float[N] x) => (float[N] y) {
            y = Add (x, x)
        }

    Skips when:
        - `only` is given and does not name the function ("domain::Name")
        - the body is written for another opset in which its operators mean something else
    """

    name: ClassVar[str] = "inline_functions"
    group: ClassVar[str] = "cleanup"

    only: tuple[str, ...] = ()

    def apply(self, model: Model, context: Context) -> Change:
        """Inline until no call is left.

        Raises:
            ModelError: A function calls itself.
        """
        change = Change()
        for _ in range(MAX_DEPTH):
            found = len(change.sites)
            change.skipped.clear()
            functions = {_key(function): function for function in model.functions}
            outputs = graph_output_ids(model)
            for graph in list(model.graphs()):
                nodes: list[gs.Node] = []
                for node in graph.nodes:
                    function = functions.get((normal_domain(node.domain), node.op, _overload(node)))
                    reason = self._reason(model, node, function)
                    if function is None or reason is not None:
                        nodes.append(node)
                        if reason:
                            change.skip(node.name or node.outputs[0].name, reason)
                        continue
                    change.sites.append(node.name or node.outputs[0].name)
                    nodes += _inline(model, node, function, outputs)
                graph.nodes[:] = nodes
            if len(change.sites) == found:
                return change
        calls = ", ".join(sorted(f"{f.domain}::{f.name}" for f in model.functions))
        raise ModelError("a model-local function calls itself", where=calls, todo="export the model again")

    def _reason(self, model: Model, node: gs.Node, function: gs.Function | None) -> str | None:
        """Return None if the call is to be inlined, or why it is not; an empty reason is not worth a word."""
        if function is None or (self.only and f"{function.domain}::{function.name}" not in self.only):
            return ""
        return _misfit(model, function)


def _key(function: gs.Function) -> tuple[str, str, str]:
    skeleton = function.__dict__.get("skeleton")
    return (normal_domain(function.domain), function.name, "" if skeleton is None else skeleton.proto.overload)


def _overload(node: gs.Node) -> str:
    skeleton = node.__dict__.get("skeleton")
    return "" if skeleton is None else str(skeleton.proto.overload)


def _misfit(model: Model, function: gs.Function) -> str | None:
    """Return why the body would mean something else in the model's graph; add the imports that it needs if it fits."""
    theirs, mine = int(function.opset), model.opset()
    if mine is None:
        model.set_opset("", theirs)
        mine = theirs
    if theirs != mine:
        inner = (n for node in function.nodes for g in node.subgraphs(recursive=True) for n in g.nodes)
        for node in (*function.nodes, *inner):
            if normal_domain(node.domain) == "" and defs.has(node.op):
                then, now = schema_of(node.op, "", theirs), schema_of(node.op, "", mine)
                if then is None or now is None or then.since_version != now.since_version:
                    return f"its body is written for opset {theirs}, the model has {mine}: {node.op} changed in between"
    for item in function.import_domains or []:
        known = model.opset(item.domain)
        if known is None:
            model.set_opset(item.domain, int(item.version))
        elif normal_domain(item.domain) != "" and known != item.version:
            return f"it imports version {item.version} of {item.domain}, the model {known}"
    return None


def _inline(model: Model, node: gs.Node, function: gs.Function, outputs: set[int]) -> list[gs.Node]:
    """Return the body connected to the tensors of `node`, which is detached."""
    values = {**function.attrs, **node.attrs}
    reads, writes = list(node.inputs), list(node.outputs)
    first = next((t for t in writes if not t.is_empty()), None)
    hint = node.name or (first.name if first is not None else node.op)
    bound: dict[int, gs.Tensor] = {}
    for i, formal in enumerate(function.inputs):
        bound[id(formal)] = reads[i] if i < len(reads) else gs.Variable.empty()
    detach(node)
    passed: list[gs.Node] = []
    for formal, actual in zip(function.outputs, writes, strict=False):
        if actual.is_empty():
            continue
        if id(formal) in bound:  # the function hands an input on, or one value twice
            name = model.fresh_name(f"{hint}/Identity")
            passed.append(gs.Node("Identity", name, {}, [bound[id(formal)]], [actual]))
        else:
            bound[id(formal)] = actual
    given = set(bound)
    nodes = copy_nodes(function, bound)
    for identity, tensor in bound.items():
        if identity not in given and not tensor.is_empty():
            tensor.name = model.fresh_name(f"{hint}/{tensor.name}")
    for inner in nodes:
        inner.name = model.fresh_name(f"{hint}/{inner.name or inner.op}")
        _resolve(inner, values)
        for body in inner.subgraphs(recursive=True):
            for deep in body.nodes:
                deep.name = model.fresh_name(f"{hint}/{deep.name or deep.op}")
                _resolve(deep, values)
    if first is not None:
        inherit_metadata(node, first)
    return nodes + passed


def _resolve(node: gs.Node, values: dict[str, Any]) -> None:
    """Replace references to the function's attributes by their values; without one the attribute goes."""
    for name, value in list(node.attrs.items()):
        if isinstance(value, gs.Node.AttributeRef):
            if values.get(value.name) is None:
                del node.attrs[name]
            else:
                node.attrs[name] = values[value.name]
