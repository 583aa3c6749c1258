"""Calls of concepts give way to operators that a target has, or to the body of their function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.concept import DOMAIN, calls, drop_unused_functions, inline_call, replace_nodes
from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.rewrite.edit import Builder, detach, redirect

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.passes import Change

__all__ = ["Lowering", "lower_calls"]

#: Builds what replaces a call and returns its outputs in order, or None where the body must do. The call is still
#: connected; the graph is the one that it is in.
Lowering = Callable[[Builder, gs.Node, gs.Graph], "Sequence[gs.Tensor] | None"]


def lower_calls(model: Model, choose: Callable[[str], Lowering | None], change: Change) -> None:
    """Replace the calls for which `choose` returns a lowering.

    Args:
        model: The model.
        choose: Returns how the calls of a concept are lowered; None leaves them for another pass.
        change: Told the names of the calls; `detail["operators"]` counts the new operators, `detail["inlined"]` the
            calls that became primitive operators, by concept.
    """
    replaced: dict[int, list[gs.Node]] = {}
    kept: list[gs.Node] = []  # so that their ids stay theirs
    operators: dict[str, int] = {}
    inlined: dict[str, int] = {}
    for graph, node in list(calls(model)):
        lowering = choose(node.op)
        if lowering is None:
            continue
        change.sites.append(node.name or node.outputs[0].name)
        kept.append(node)
        op = Builder(model, node.name or node.outputs[0].name)
        made = lowering(op, node, graph)
        if made is None:
            inlined[node.op] = inlined.get(node.op, 0) + 1
            replaced[id(node)] = inline_call(model, node)
            continue
        outputs = list(node.outputs)
        detach(node)
        for old, new in zip(outputs, made, strict=True):
            _take_place(op.nodes, old, new)
        if node.name:
            outputs[0].inputs[0].name = node.name
        for new_node in op.nodes:
            name = f"{new_node.domain}::{new_node.op}" if new_node.domain else new_node.op
            operators[name] = operators.get(name, 0) + 1
        replaced[id(node)] = op.nodes
    replace_nodes(model, replaced)
    if replaced:
        drop_unused_functions(model)
    for key, counts in (("operators", operators), ("inlined", inlined)):
        if counts:
            change.detail[key] = dict(sorted(counts.items()))


def _take_place(nodes: Sequence[gs.Node], old: gs.Variable, new: gs.Tensor) -> None:
    for node in nodes:
        for i, tensor in enumerate(node.outputs):
            if tensor is new:
                redirect(new, old)  # a new node may read another one's output
                node.outputs[i] = old
                return
    raise CompilerBug("a lowering returned a tensor that it did not make", where=f"{DOMAIN} call for '{old.name}'")
