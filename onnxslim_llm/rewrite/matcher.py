"""Find a pattern in a graph, and say where the search got stuck.

The matcher walks from the root's producer towards the inputs, with backtracking over alternatives and the operand
order of commutative operators. It looks at operators, attributes (compared against the schema defaults of the model's
opset) and constants, never at names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.rewrite.constants import constant_tensor, constant_value, is_constant
from onnxslim_llm.rewrite.pattern import Bind, ConstantPattern, Either, NodePattern, Output, Pattern, Wildcard
from onnxslim_llm.rewrite.schema import COMMUTATIVE, attribute_default, has_attribute, input_index, normal_domain

__all__ = ["Match", "Matcher", "Stuck"]


@dataclass(frozen=True)
class Stuck:
    """The farthest point that a failed search reached.

    Attributes:
        reason: What was found instead of what was expected.
        culprit: Name of the node or tensor there.
        depth: Number of pattern nodes that had matched.
    """

    reason: str
    culprit: str
    depth: int


@dataclass(frozen=True)
class Match:
    """A place where the pattern fits.

    Attributes:
        tensors: Wildcard name -> tensor.
        attributes: Name given to `op.bind` -> value.
        nodes: Pattern nodes by identity -> node of the graph; `node(name)` finds a named one.
        outputs: The tensors that the pattern returned, the root's first.
    """

    tensors: dict[str, gs.Tensor]
    attributes: dict[str, Any]
    nodes: dict[int, gs.Node]
    named: dict[str, gs.Node]
    outputs: tuple[gs.Variable, ...] = ()

    @property
    def root(self) -> gs.Node:
        """The node that produces the first output."""
        return self.outputs[0].inputs[0]

    def __getitem__(self, name: str) -> gs.Tensor:
        return self.tensors[name]

    def node(self, name: str) -> gs.Node:
        """Return the node whose pattern was given `_name=name`."""
        return self.named[name]

    def value(self, name: str) -> NDArray[Any] | None:
        """Return the value of a small constant bound to `name`, or None."""
        return constant_value(self.tensors[name])

    def scalar(self, name: str) -> float | None:
        """Return the value of a one-element constant bound to `name`, or None."""
        value = self.value(name)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


@dataclass
class Matcher:
    """Searches one graph.

    Args:
        opset: Returns the opset version of a domain in this model.
        graph_outputs: Identities (`id`) of the tensors that are an output of any graph of the model.
    """

    opset: Callable[[str], int | None]
    graph_outputs: set[int]
    stuck: Stuck | None = field(default=None, init=False)

    def find(self, outputs: tuple[Output, ...], root: gs.Node, keep_shared: bool = False) -> Match | None:
        """Match the pattern `outputs` with its first output produced by `root`.

        Args:
            outputs: What the rule's `pattern` returned; all but the first must lie inside the first one's subgraph.
            root: Candidate for the producer of the first output.
            keep_shared: Accept inner tensors that are used outside of the match (their nodes then stay).

        Returns:
            The first match; None if there is none, with `stuck` saying how far the search came.
        """
        self.stuck = None
        start = Match({}, {}, {}, {})
        for match in self._node(outputs[0].node, root, start):
            if outputs[0].index >= len(root.outputs) or root.outputs[outputs[0].index].is_empty():
                continue
            found = tuple(match.nodes[id(o.node)].outputs[o.index] for o in outputs if id(o.node) in match.nodes)
            if len(found) != len(outputs):
                continue
            whole = Match(match.tensors, match.attributes, match.nodes, match.named, found)
            if keep_shared or self._is_closed(whole):
                return whole
        return None

    def _fail(self, match: Match, reason: str, culprit: str) -> None:
        depth = len(match.nodes)
        if self.stuck is None or depth > self.stuck.depth:
            self.stuck = Stuck(reason, culprit, depth)

    def _is_closed(self, match: Match) -> bool:
        inside = {id(n) for n in match.nodes.values()}
        visible = {id(t) for t in match.outputs}
        for node in match.nodes.values():
            for tensor in node.outputs:
                if id(tensor) in visible:
                    continue
                if id(tensor) in self.graph_outputs:
                    self._fail(match, "an inner tensor is also a graph output", tensor.name)
                    return False
                if any(id(user) not in inside for user in tensor.outputs):
                    self._fail(match, "an inner tensor is used elsewhere too", tensor.name)
                    return False
        return True

    def _tensor(self, pattern: Pattern | None, tensor: gs.Tensor | None, match: Match) -> Iterator[Match]:
        absent = tensor is None or tensor.is_empty()
        if pattern is None or absent:
            if pattern is None and absent:
                yield match
            return
        assert tensor is not None
        if isinstance(pattern, Wildcard):
            yield from self._wildcard(pattern, tensor, match)
        elif isinstance(pattern, ConstantPattern):
            if _constant_equals(pattern, tensor):
                yield match
            else:
                self._fail(match, f"expected the constant {_brief(pattern.value)}", tensor.name)
        elif isinstance(pattern, Either):
            for alternative in pattern.alternatives:
                yield from self._tensor(alternative, tensor, match)
        elif isinstance(pattern, Output):
            producer = tensor.inputs[0] if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 else None
            if producer is None:
                kind = "a constant" if isinstance(tensor, gs.Constant) else "a graph input"
                self._fail(match, f"expected {_ops(pattern.node)}, found {kind}", tensor.name)
            elif producer.outputs[min(pattern.index, len(producer.outputs) - 1)] is not tensor:
                self._fail(match, f"expected output {pattern.index} of {_ops(pattern.node)}", tensor.name)
            else:
                yield from self._node(pattern.node, producer, match)

    def _wildcard(self, pattern: Wildcard, tensor: gs.Tensor, match: Match) -> Iterator[Match]:
        bound = match.tensors.get(pattern.name)
        if bound is not None:
            if bound is tensor or _same_constant(bound, tensor):
                yield match
            else:
                self._fail(match, f"expected '{pattern.name}' ({bound.name}) again", tensor.name)
            return
        if pattern.constant and not is_constant(tensor):
            self._fail(match, f"'{pattern.name}' must be a constant", tensor.name)
            return
        yield Match({**match.tensors, pattern.name: tensor}, match.attributes, match.nodes, match.named)

    def _node(self, pattern: NodePattern, node: gs.Node, match: Match) -> Iterator[Match]:
        known = match.nodes.get(id(pattern))
        if known is not None:
            if known is node:
                yield match
            return
        if node.op not in pattern.ops or normal_domain(node.domain) != normal_domain(pattern.domain):
            self._fail(match, f"expected {_ops(pattern)}, found {node.op}", node.name or node.op)
            return
        attributes = self._attributes(pattern, node, match)
        if attributes is None:
            return
        named = {**match.named, pattern.name: node} if pattern.name else match.named
        here = Match(match.tensors, attributes, {**match.nodes, id(pattern): node}, named)
        inputs: list[gs.Tensor | None] = list(node.inputs)
        by_keyword = self._keyword_inputs(pattern, node)
        wanted = len(pattern.inputs)
        surplus = [t for i, t in enumerate(inputs) if i >= wanted and i not in by_keyword and t and not t.is_empty()]
        if surplus and not pattern.open_ended:
            self._fail(here, f"{node.op} has {len(inputs)} inputs, the pattern {wanted}", node.name or node.op)
            return
        inputs += [None] * (wanted - len(inputs))
        yield from self._inputs(pattern.inputs, inputs[:wanted], here)
        if node.op in COMMUTATIVE and normal_domain(node.domain) == "" and wanted == 2:
            yield from self._inputs(pattern.inputs, [inputs[1], inputs[0]], here)

    def _inputs(
        self, patterns: tuple[Pattern | None, ...], tensors: list[gs.Tensor | None], match: Match
    ) -> Iterator[Match]:
        if not patterns:
            yield match
            return
        for first in self._tensor(patterns[0], tensors[0], match):
            yield from self._inputs(patterns[1:], tensors[1:], first)

    def _keyword_inputs(self, pattern: NodePattern, node: gs.Node) -> set[int]:
        version = self.opset(node.domain or "") or 1
        positions = (input_index(node.op, node.domain or "", version, name) for name in pattern.attributes)
        return {p for p in positions if p is not None}

    def _attributes(self, pattern: NodePattern, node: gs.Node, match: Match) -> dict[str, Any] | None:
        found = dict(match.attributes)
        for name, expected in pattern.attributes.items():
            actual = self._attribute(node, name)
            rank = _rank(node, actual)
            if isinstance(expected, Bind):
                if not expected.accepts(actual):
                    self._fail(match, f"{node.op}.{name} is {_brief(actual)}", node.name or node.op)
                    return None
                found[expected.name] = actual
            elif not _attribute_equals(name, expected, actual, rank):
                message = f"{node.op}.{name} is {_brief(actual)}, expected {_brief(expected)}"
                self._fail(match, message, node.name or node.op)
                return None
        return found

    def _attribute(self, node: gs.Node, name: str) -> Any:
        """Return an attribute, its schema default, or the constant at the formal input of that name."""
        if name in node.attrs:
            value = node.attrs[name]
            return constant_value(value) if isinstance(value, gs.Constant) else value
        domain, version = node.domain or "", self.opset(node.domain or "") or 1
        if has_attribute(node.op, domain, version, name):
            return attribute_default(node.op, domain, version, name)
        position = input_index(node.op, domain, version, name)
        if position is not None and position < len(node.inputs) and not node.inputs[position].is_empty():
            return constant_value(node.inputs[position])
        return None


def _ops(pattern: NodePattern) -> str:
    return " or ".join(pattern.ops)


def _brief(value: Any) -> str:
    text = str(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 40 else text[:37] + "..."


def _rank(node: gs.Node, axes: Any) -> int | None:
    """Return the rank that the node's axes count in."""
    shape = getattr(node.inputs[0], "shape", None) if node.inputs else None
    if shape is None:
        return None
    return len(shape) + np.size(axes) if node.op == "Unsqueeze" else len(shape)


def _constant_equals(pattern: ConstantPattern, tensor: gs.Tensor) -> bool:
    value = constant_value(tensor)
    if value is None or value.size == 0 or value.dtype.kind in "OSU":
        return value is not None and value.size == pattern.value.size == 0
    expected = pattern.value
    if expected.ndim and expected.size != value.size:
        return False
    if value.dtype.kind in "iub" and expected.dtype.kind in "iub":
        return bool(np.all(value.reshape(-1) == expected.reshape(-1)))
    if value.dtype.kind not in "iub":
        expected = expected.astype(value.dtype)  # a float16 constant has the digits that float16 has
    actual = value.reshape(-1).astype(np.float64)
    close = np.isclose(actual, expected.reshape(-1).astype(np.float64), rtol=pattern.relative_tolerance, atol=0.0)
    return bool(np.all(close))


def _attribute_equals(name: str, expected: Any, actual: Any, rank: int | None) -> bool:
    if callable(expected):
        return bool(expected(actual))
    if expected is None or actual is None:
        return expected is None and actual is None
    left, right = np.asarray(expected), np.asarray(actual)
    if name in ("axis", "axes") and rank:
        left, right = left % rank, right % rank
    if left.dtype.kind == "f" or right.dtype.kind == "f":
        return left.size == right.size and bool(np.allclose(left.reshape(-1), right.reshape(-1), rtol=1e-6, atol=0.0))
    return left.size == right.size and bool(np.all(left.reshape(-1) == right.reshape(-1)))


def _same_constant(a: gs.Tensor, b: gs.Tensor) -> bool:
    left, right = constant_tensor(a), constant_tensor(b)
    return left is not None and right is not None and weight_of(left).key == weight_of(right).key
