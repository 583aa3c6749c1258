"""Inputs and outputs of If, Loop and Scan bodies that nothing needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.rewrite.edit import redirect, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["PruneSubgraphs"]

#: Before opset 9, Scan had a batch axis and an input of sequence lengths.
_SCAN_SINCE = 9


@dataclass(frozen=True)
class PruneSubgraphs(Pass):
    """Remove inputs and outputs of If, Loop and Scan bodies that nothing needs.

    An output that nobody reads goes from the node and from its bodies. A state of a loop that never changes is read
    from outside instead; a state or a scanned input that the body does not use goes.

    Before:
        agraph (bool c, float[N] x) => (float[N] y) {
            y, unused = If (c) <
                then_branch = a () => (float[N] p, float[N] q) { p = Exp (x)  q = Sin (x) },
                else_branch = b () => (float[N] r, float[N] s) { r = Log (x)  s = Cos (x) }>
        }

    After:
        agraph (bool c, float[N] x) => (float[N] y) {
            y = If (c) <
                then_branch = a () => (float[N] p) { p = Exp (x) },
                else_branch = b () => (float[N] r) { r = Log (x) }>
        }

    Skips when:
        - it would leave the node without any output, or a Scan without anything to scan
        - the state is only used to compute itself
    """

    name: ClassVar[str] = "prune_subgraphs"
    group: ClassVar[str] = "cleanup"

    def apply(self, model: Model, context: Context) -> Change:
        """Prune until nothing is left to prune: what goes from one body may free an input of another."""
        change = Change()
        while True:
            before = len(change.sites)
            outputs = graph_output_ids(model)
            for graph in list(model.graphs()):
                for node in graph.nodes:
                    if normal_domain(node.domain) == "" and node.op in _PRUNERS:
                        change.sites += _PRUNERS[node.op](_Ports(node, outputs), model)
            if len(change.sites) == before:
                return change
            gone = {id(n) for n in remove_dead((n for g in model.graphs() for n in g.nodes), graph_output_ids(model))}
            for graph in model.graphs():
                graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]


@dataclass(frozen=True)
class _Ports:
    """A node with bodies, and the identities of all graph outputs."""

    node: gs.Node
    graph_outputs: set[int]

    def unused(self, index: int) -> bool:
        """Return whether nobody reads an output of the node."""
        tensor = self.node.outputs[index]
        return tensor.is_empty() or (not tensor.outputs and id(tensor) not in self.graph_outputs)

    def drop_output(self, index: int) -> str:
        """Remove an output of the node."""
        tensor = self.node.outputs[index]
        del self.node.outputs[index]
        return tensor.name or f"{self.node.name} output {index}"


def _prune_if(ports: _Ports, model: Model) -> list[str]:
    node, sites = ports.node, []
    for i in reversed(range(len(node.outputs))):
        if len(node.outputs) > 1 and ports.unused(i):
            for branch in ("then_branch", "else_branch"):
                del node.attrs[branch].outputs[i]
            sites.append(ports.drop_output(i))
    return sites


def _prune_loop(ports: _Ports, model: Model) -> list[str]:
    node, sites = ports.node, []
    body: gs.Graph = node.attrs["body"]
    states = len(node.inputs) - 2
    for i in reversed(range(states, len(node.outputs))):
        if len(node.outputs) > 1 and ports.unused(i):
            del body.outputs[1 + i]
            sites.append(ports.drop_output(i))
    for i in reversed(range(states)):
        if _free_state(ports, body, i, 2 + i, 2 + i, 1 + i):
            del node.inputs[2 + i], body.inputs[2 + i], body.outputs[1 + i]
            sites.append(ports.drop_output(i))
    return sites


def _prune_scan(ports: _Ports, model: Model) -> list[str]:
    node = ports.node
    sites: list[str] = []
    if (model.opset() or 1) < _SCAN_SINCE:
        return sites
    body: gs.Graph = node.attrs["body"]
    scanned = int(node.attrs["num_scan_inputs"])
    states = len(node.inputs) - scanned
    for i in reversed(range(states, len(node.outputs))):
        if len(node.outputs) > 1 and ports.unused(i):
            del body.outputs[i]
            _drop_items(node, ("scan_output_axes", "scan_output_directions"), i - states)
            sites.append(ports.drop_output(i))
    for i in reversed(range(states)):
        if _free_state(ports, body, i, i, i, i):
            del node.inputs[i], body.inputs[i], body.outputs[i]
            sites.append(ports.drop_output(i))
            states -= 1
    for i in reversed(range(scanned)):
        tensor = body.inputs[states + i]
        if int(node.attrs["num_scan_inputs"]) > 1 and not tensor.outputs and not _holds(body.outputs, tensor):
            del node.inputs[states + i], body.inputs[states + i]
            _drop_items(node, ("scan_input_axes", "scan_input_directions"), i)
            node.attrs["num_scan_inputs"] = int(node.attrs["num_scan_inputs"]) - 1
            sites.append(tensor.name)
    return sites


def _free_state(ports: _Ports, body: gs.Graph, output: int, outside: int, inside: int, after: int) -> bool:
    """Return whether a state can go; one that never changes is replaced by its first value before.

    Args:
        ports: The node.
        body: Its body.
        output: Position among the node's outputs.
        outside: Position among the node's inputs.
        inside: Position among the body's inputs.
        after: Position among the body's outputs.
    """
    node, state = ports.node, body.inputs[inside]
    others = [tensor for i, tensor in enumerate(body.outputs) if i != after]
    if len(node.outputs) < 2 or _holds(others, state):
        return False
    final = node.outputs[output]
    if body.outputs[after] is state:
        if id(final) in ports.graph_outputs or node.inputs[outside].is_empty():
            return False
        redirect(state, node.inputs[outside])
        redirect(final, node.inputs[outside])
        return True
    return ports.unused(output) and not state.outputs


def _holds(tensors: list[gs.Tensor], wanted: gs.Tensor) -> bool:
    return any(tensor is wanted for tensor in tensors)


def _drop_items(node: gs.Node, names: tuple[str, ...], index: int) -> None:
    for name in names:
        items: Any = node.attrs.get(name)
        if items:
            node.attrs[name] = [item for i, item in enumerate(items) if i != index]


_PRUNERS = {"If": _prune_if, "Loop": _prune_loop, "Scan": _prune_scan}
