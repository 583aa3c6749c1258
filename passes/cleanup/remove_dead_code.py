"""What no output depends on goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_graphsurgeon as gs
from onnx import defs

from onnxslim_llm.ir.ownership import drop_orphans
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.rewrite.edit import remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain, schema_of

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["RemoveDeadCode"]

_OPTIONAL = defs.OpSchema.FormalParameterOption.Optional


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Remove nodes, initializers and model-local functions that no output depends on, and sort the nodes.

    Optional outputs that nobody reads are left out as well. Inputs and outputs of the model always stay.

    Before:
        agraph (float[N] x) => (float[N] y) {
            unused = Exp (x)
            y, mask = Dropout (x)
        }

    After:
        agraph (float[N] x) => (float[N] y) {
            y = Dropout (x)
        }

    Skips when:
        - an unused initializer is the default of a graph input, which the caller may know
    """

    name: ClassVar[str] = "remove_dead_code"
    group: ClassVar[str] = "cleanup"

    def apply(self, model: Model, context: Context) -> Change:
        """Remove dead nodes first, then what only they used."""
        change = Change()
        outputs = graph_output_ids(model)
        dead = remove_dead_nodes(model, outputs)
        change.sites += dead
        optional = 0
        for graph in model.graphs():
            change.sites += drop_orphans(graph)
            if sort_nodes(graph):
                change.sites.append(graph.name or "graph")
            optional += sum(_drop_unused_outputs(node, model, outputs) for node in graph.nodes)
        functions = _drop_functions(model)
        change.sites += functions
        if optional:
            change.sites.append("optional outputs")
        change.detail = {"nodes": len(dead), "functions": len(functions), "optional_outputs": optional}
        return change


def remove_dead_nodes(model: Model, outputs: set[int]) -> list[str]:
    """Remove the nodes that no output depends on; return how they were called."""
    names = {id(n): n.name or next((t.name for t in n.outputs), n.op) for g in model.graphs() for n in g.nodes}
    dead = remove_dead((node for graph in list(model.graphs()) for node in graph.nodes), outputs)
    gone = {id(node) for node in dead}
    if gone:
        for graph in model.graphs():
            graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
    return [names[id(node)] for node in dead if id(node) in names]


def _drop_unused_outputs(node: gs.Node, model: Model, outputs: set[int]) -> int:
    dropped = 0
    if len(node.outputs) > 1:
        schema = schema_of(node.op, node.domain or "", model.opset(node.domain or "") or 1)
        if schema is None or normal_domain(node.domain) != "":
            return 0
        for i, tensor in enumerate(node.outputs):
            unused = not tensor.is_empty() and not tensor.outputs and id(tensor) not in outputs
            if unused and i < len(schema.outputs) and schema.outputs[i].option == _OPTIONAL:
                node.outputs[i] = gs.Variable.empty()
                dropped += 1
        while node.outputs and node.outputs[-1].is_empty() and len(node.outputs) > schema.min_output:
            node.outputs.pop()
    return dropped


def _drop_functions(model: Model) -> list[str]:
    """Remove the functions that no node calls, through other functions either; return their names."""
    by_name: dict[tuple[str, str], list[gs.Function]] = {}
    for function in model.functions:
        by_name.setdefault((normal_domain(function.domain), function.name), []).append(function)
    alive: set[int] = set()
    stack = [node for graph in model.graphs() for node in graph.nodes]
    while stack:
        node = stack.pop()
        # Overloads are not told apart: all functions of a name stay if one is called.
        for function in by_name.get((normal_domain(node.domain), node.op), []):
            if id(function) not in alive:
                alive.add(id(function))
                stack.extend(function.nodes)
                stack.extend(n for inner in function.nodes for g in inner.subgraphs(recursive=True) for n in g.nodes)
    dead = [function for function in model.functions if id(function) not in alive]
    if dead:
        model.functions[:] = [function for function in model.functions if id(function) in alive]
    return [f"{function.domain}::{function.name}" for function in dead]
