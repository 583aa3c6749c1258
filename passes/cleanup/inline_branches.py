"""An If that always goes the same way is replaced by that way."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.edit import detach, redirect
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["InlineBranches"]


@dataclass(frozen=True)
class InlineBranches(Pass):
    """Replace an If whose condition is a constant by the branch that it takes.

    TorchScript writes such conditions about ranks and sizes, which become constants once shapes are folded.

    Before:
        agraph (float[N] x) => (float[N] y) <bool c = {1}> {
            y = If (c) <
                then_branch = a () => (float[N] p) { e = Exp (x)  p = Neg (e) },
                else_branch = b () => (float[N] q) { q = Log (x) }>
        }

    After:
        agraph (float[N] x) => (float[N] y) {
            e = Exp (x)
            y = Neg (e)
        }

    Skips when:
        - the condition is computed, or the default of a graph input
    """

    name: ClassVar[str] = "inline_branches"
    group: ClassVar[str] = "cleanup"

    def apply(self, model: Model, context: Context) -> Change:
        """Inline until no such If is left: branches may contain others."""
        change = Change()
        while True:
            found = len(change.sites)
            outputs = graph_output_ids(model)
            for graph in list(model.graphs()):
                nodes: list[gs.Node] = []
                for node in graph.nodes:
                    taken = _taken(node)
                    if taken is None:
                        nodes.append(node)
                    else:
                        change.sites.append(node.name or node.outputs[0].name)
                        nodes += _inline(model, node, taken, outputs)
                graph.nodes[:] = nodes
            if len(change.sites) == found:
                return change
            _rename_doubles(model)


def _taken(node: gs.Node) -> gs.Graph | None:
    """Return the branch that an If always takes, or None."""
    if node.op != "If" or normal_domain(node.domain) != "" or not node.inputs:
        return None
    condition = constant_value(node.inputs[0])
    if condition is None or condition.size != 1:
        return None
    branch = node.attrs.get("then_branch" if condition.reshape(-1)[0] else "else_branch")
    return branch if isinstance(branch, gs.Graph) else None


def _inline(model: Model, node: gs.Node, branch: gs.Graph, outputs: set[int]) -> list[gs.Node]:
    """Return the nodes of the branch, connected to the outputs of `node`, which is detached."""
    nodes, results, wanted = list(branch.nodes), list(branch.outputs), list(node.outputs)
    branch.nodes[:] = []
    detach(node)
    made = {id(t): n for n in nodes for t in n.outputs}
    replaced: dict[int, gs.Tensor] = {}
    for result, tensor in zip(results, wanted, strict=True):
        if tensor.is_empty():
            continue
        source = replaced.get(id(result), result)
        if source is result and id(result) in made:
            producer = made[id(result)]
            index = next(i for i, t in enumerate(producer.outputs) if t is result)
            redirect(result, tensor)
            producer.outputs[index] = tensor
            replaced[id(result)] = tensor
        elif id(tensor) in outputs:
            nodes.append(gs.Node("Identity", model.fresh_name(f"{tensor.name}/Identity"), {}, [source], [tensor]))
        else:
            redirect(tensor, source)
    return nodes


def _rename_doubles(model: Model) -> None:
    """Give new names to tensors that now share theirs with another tensor: two branches may use the same ones."""
    by_name: dict[str, dict[int, gs.Tensor]] = defaultdict(dict)
    for graph in model.graphs():
        for tensor in (*graph.inputs, *graph.outputs):
            by_name[tensor.name][id(tensor)] = tensor
        for node in graph.nodes:
            for tensor in (*node.outputs, *node.inputs):
                by_name[tensor.name][id(tensor)] = tensor
    fixed = {id(t) for t in (*model.graph.inputs, *model.graph.outputs)}
    for name, tensors in by_name.items():
        if name and len(tensors) > 1:
            keeper = next((t for t in tensors.values() if id(t) in fixed), next(iter(tensors.values())))
            for tensor in tensors.values():
                if tensor is not keeper:
                    tensor.name = model.fresh_name(name)
