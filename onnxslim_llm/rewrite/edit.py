"""Changes to a graph that keep it whole: new nodes, replaced tensors, removed nodes.

graphsurgeon compares tensors by name, so everything here goes by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.proto.skeleton import NodeSkeleton, skeleton_of
from onnxslim_llm.ir.weights import constant

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["Builder", "detach", "inherit_metadata", "redirect", "remove_dead", "replace_output"]


class Builder:
    """Makes nodes: `op.Add(x, y)`, `op.call("com.microsoft", "MatMulNBits", a, b, K=64)`.

    The nodes are collected in `nodes`, in order; the caller puts them into the graph of `model`.
    """

    def __init__(self, model: Model, hint: str) -> None:
        self.model = model
        self._hint = hint
        self.nodes: list[gs.Node] = []

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_"):
            raise AttributeError(op)
        return lambda *inputs, **attrs: self.call("", op, *inputs, **attrs)

    def call(self, domain: str, op: str, *inputs: Any, _outputs: int = 1, _name: str = "", **attrs: Any) -> Any:
        """Add a node; an input may be None (omitted), a number, a list or an array (becomes a constant)."""
        name = self.model.fresh_name(_name or f"{self._hint}/{op}")
        outputs = [gs.Variable(self.model.fresh_name(f"{name}_output_{i}")) for i in range(_outputs)]
        tensors = [self._operand(value, f"{name}_input_{i}") for i, value in enumerate(inputs)]
        present = {k: v for k, v in attrs.items() if v is not None}
        self.nodes.append(gs.Node(op, name, present, tensors, outputs, domain or None))
        return outputs[0] if _outputs == 1 else tuple(outputs)

    def constant(self, value: Any, hint: str = "") -> gs.Constant:
        """Return a new initializer with the given value or `Weight`."""
        return constant(self.model.fresh_name(hint or f"{self._hint}/constant"), value)

    def _operand(self, value: Any, hint: str) -> gs.Tensor:
        if value is None:
            return gs.Variable.empty()
        if isinstance(value, gs.Tensor):
            return value
        array = np.asarray(value)
        if array.dtype == np.float64:  # Python floats; ONNX models compute in float32
            array = array.astype(np.float32)
        return self.constant(array, hint)


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every node that reads `old`, in subgraphs too, read `new`."""
    if old is new:
        return
    # graphsurgeon keeps both directions in step by searching lists for equal nodes: slow for a tensor with many users,
    # and two nodes without names can be equal. So its lists are changed here from below.
    for user in {id(n): n for n in old.outputs}.values():
        for i, tensor in enumerate(user.inputs):
            if tensor is old:
                list.__setitem__(user.inputs, i, new)
    list.extend(new.outputs, old.outputs)
    list.clear(old.outputs)


def _unlink(links: list[gs.Node], node: gs.Node) -> None:
    """Take one entry of `node` (by identity) out of a tensor's list of producers or users."""
    for i, other in enumerate(links):
        if other is node:
            list.__delitem__(links, i)
            return


def replace_output(old: gs.Variable, new: gs.Tensor, fresh: Iterable[gs.Node], graph_outputs: set[int]) -> bool:
    """Put `new` in the place of the node output `old`, keeping the name of `old` where it is still needed.

    Args:
        old: An output of the matched subgraph; its producer is detached from it.
        new: An output of one of the `fresh` nodes, or any tensor that exists already.
        fresh: Nodes made by the rewrite.
        graph_outputs: Identities of all tensors that are outputs of a graph.

    Returns:
        False if `old` is a graph output that cannot take over the name of `new` (an Identity has to stay); nothing
        was changed then.
    """
    if new is old:
        return True
    for node in fresh:
        for i, tensor in enumerate(node.outputs):
            # A graph output that an earlier replacement put there keeps its name.
            if tensor is new and id(new) not in graph_outputs:
                _drop_output(old)
                redirect(tensor, old)  # a fresh node may read another one's output
                old.dtype = old.dtype if old.dtype is not None else tensor.dtype
                old.shape = old.shape if old.shape is not None else tensor.shape
                node.outputs[i] = old
                return True
    movable = isinstance(new, gs.Variable) and len(new.inputs) == 1 and id(new) not in graph_outputs
    movable = movable and _same_graph(new.inputs[0], old.inputs[0])
    # The later name stays where nobody else knows the earlier one: a result that went through steps without effect is
    # still that result, so that compiling again finds the names that it left.
    passed_on = movable and all(user is old.inputs[0] for user in new.outputs)
    if id(old) not in graph_outputs and not passed_on:
        _drop_output(old)
        redirect(old, new)
        return True
    if not movable:
        return False
    producer = new.inputs[0]
    _drop_output(old)
    redirect(new, old)
    producer.outputs[_index(producer.outputs, new)] = old
    return True


def _same_graph(a: gs.Node, b: gs.Node) -> bool:
    home = getattr(a, "home", None)
    return home is not None and home is getattr(b, "home", None)


def _index(tensors: Iterable[gs.Tensor], wanted: gs.Tensor) -> int:
    return next(i for i, t in enumerate(tensors) if t is wanted)


def _drop_output(tensor: gs.Variable) -> None:
    """Take `tensor` from its producer, leaving an unused placeholder so that other outputs keep their position."""
    for node in list(tensor.inputs):
        node.outputs[_index(node.outputs, tensor)] = gs.Variable.empty()


def detach(node: gs.Node) -> None:
    """Cut a node, and the nodes of its subgraphs, off from all tensors."""
    for graph in node.subgraphs(recursive=True):
        for inner in graph.nodes:
            _cut(inner)
    _cut(node)


def _cut(node: gs.Node) -> None:
    for tensor in node.inputs:
        _unlink(tensor.outputs, node)
    for tensor in node.outputs:
        _unlink(tensor.inputs, node)
    list.clear(node.inputs)
    list.clear(node.outputs)


def inherit_metadata(old: gs.Node, output: gs.Variable) -> None:
    """Give metadata and doc string of the replaced node `old` to the new node that makes `output`, if it has none."""
    skeleton: NodeSkeleton | None = skeleton_of(old, NodeSkeleton)
    node = output.inputs[0] if output.inputs else None
    if skeleton is None or node is None or skeleton_of(node, NodeSkeleton) is not None:
        return
    kept = onnx.NodeProto(metadata_props=skeleton.proto.metadata_props)
    if skeleton.proto.doc_string:
        kept.doc_string = skeleton.proto.doc_string
    node.skeleton = NodeSkeleton(kept, {})


def remove_dead(candidates: Iterable[gs.Node], graph_outputs: set[int]) -> list[gs.Node]:
    """Detach those of `candidates`, and of the nodes before them, whose outputs nobody reads any more.

    Returns:
        The detached nodes; the caller takes them out of the graph's node list.
    """
    dead: list[gs.Node] = []
    stack = list(candidates)
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in seen or any(t.outputs or id(t) in graph_outputs for t in node.outputs if not t.is_empty()):
            continue
        seen.add(id(node))
        inner = [t for g in node.subgraphs(recursive=True) for n in g.nodes for t in n.inputs]
        producers = [t.inputs[0] for t in (*node.inputs, *inner) if isinstance(t, gs.Variable) and t.inputs]
        detach(node)
        dead.append(node)
        stack.extend(producers)
    return dead
