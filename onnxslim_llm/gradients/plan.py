"""What is to be done in which order, found once for each set of given and wanted tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnxslim_llm.gradients.rule import Rule
from onnxslim_llm.gradients.table import rule_of
from onnxslim_llm.ir.topology import read_tensors
from onnxslim_llm.ir.walk import operator_name
from onnxslim_llm.ir.weights import dtypes, weight_of
from onnxslim_llm.rewrite.schema import normal_domain, schema_of

__all__ = ["Plan", "Step", "make_plan", "refusals"]

Functions = Mapping[tuple[str, str], gs.Function]


@dataclass
class Step:
    """One node: with a rule, with the body of a function, or with two branches.

    Attributes:
        node: The node.
        where: Its name.
        opset: Version of its domain.
        attributes: Its own, and the schema's defaults.
        types: ONNX element types of its inputs, as far as they are known.
        rule: What computes it; None for functions and If.
        body: Of the function that it calls.
        branches: Of If: then and else.
        last: Tensors (by identity) that nobody reads after it.
    """

    node: gs.Node
    where: str
    opset: int
    attributes: dict[str, Any]
    types: tuple[int | None, ...] = ()
    rule: Rule | None = None
    body: Plan | None = None
    branches: tuple[Plan, Plan] | None = None
    last: list[int] = field(default_factory=list)


@dataclass
class Plan:
    """Steps in order.

    Attributes:
        inputs: Formal inputs of a function.
        outputs: What is wanted.
        steps: What is done.
    """

    inputs: Sequence[gs.Tensor]
    outputs: Sequence[gs.Tensor]
    steps: list[Step]


def make_plan(
    nodes: Sequence[gs.Node],
    inputs: Sequence[gs.Tensor],
    outputs: Sequence[gs.Tensor],
    given: Collection[int],
    functions: Functions,
    opsets: Mapping[str, int],
    attributes: Mapping[str, Any] | None = None,
) -> Plan:
    """Return the steps that lead from what is given to what is wanted.

    Args:
        nodes: In topological order.
        inputs: Formal inputs, for functions.
        outputs: What is wanted.
        given: Identities of tensors that need not be computed.
        functions: The model's functions by domain and name.
        opsets: Version of each domain.
        attributes: Values of the attributes of the function that the nodes belong to.
    """
    needed = {id(tensor) for tensor in outputs} - set(given)
    chosen: list[gs.Node] = []
    for node in reversed(nodes):
        if any(id(tensor) in needed for tensor in node.outputs):
            chosen.append(node)
            needed |= {id(t) for t in read_tensors(node) if not t.is_empty()} - set(given)
    chosen.reverse()
    steps = [_step(node, given, functions, opsets, attributes or {}) for node in chosen]
    _release(steps, outputs)
    return Plan(inputs, outputs, steps)


def _step(
    node: gs.Node,
    given: Collection[int],
    functions: Functions,
    opsets: Mapping[str, int],
    values: Mapping[str, Any],
) -> Step:
    domain = normal_domain(node.domain)
    opset = opsets.get(domain, 1)
    where = node.name or (node.outputs[0].name if node.outputs else node.op)
    types = tuple(_type_of(tensor) for tensor in node.inputs)
    step = Step(node, where, opset, _attributes(node, domain, opset, values), types, rule_of(node))
    if step.rule is None and (domain, node.op) in functions:
        function = functions[domain, node.op]
        own = {normal_domain(item.domain): int(item.version) for item in function.import_domains}
        step.body = make_plan(
            function.nodes, function.inputs, function.outputs, (), functions, {**opsets, **own}, step.attributes
        )
    elif not domain and node.op == "If":
        graphs = (step.attributes["then_branch"], step.attributes["else_branch"])
        first, second = (make_plan(g.nodes, (), g.outputs, given, functions, opsets, values) for g in graphs)
        step.branches = (first, second)
    return step


def _attributes(node: gs.Node, domain: str, opset: int, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    schema = schema_of(node.op, domain, opset)
    if schema is not None:
        for name, entry in schema.attributes.items():
            if entry.default_value.type != onnx.AttributeProto.UNDEFINED:
                value = onnx.helper.get_attribute_value(entry.default_value)
                found[name] = value.decode() if isinstance(value, bytes) else value
    for name, value in node.attrs.items():
        if isinstance(value, gs.Node.AttributeRef):
            if value.name in values:
                found[name] = values[value.name]
        else:
            found[name] = dtypes.onnx_dtype(value) if name == "to" else value
    return found


def _type_of(tensor: gs.Tensor) -> int | None:
    if isinstance(tensor, gs.Constant):
        return weight_of(tensor).onnx_dtype
    return None if tensor.dtype is None else dtypes.onnx_dtype(tensor.dtype)


def _release(steps: list[Step], outputs: Iterable[gs.Tensor]) -> None:
    """Say after which step each tensor is not needed any more, so that it does not take memory longer."""
    kept = {id(tensor) for tensor in outputs}
    seen: set[int] = set()
    for step in reversed(steps):
        for tensor in (*step.node.outputs, *read_tensors(step.node)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                if id(tensor) not in kept and isinstance(tensor, gs.Variable):
                    step.last.append(id(tensor))


def refusals(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield (node, operator) for every step that nothing computes."""
    for step in plan.steps:
        if step.body is not None:
            yield from ((f"{step.where}/{where}", op) for where, op in refusals(step.body))
        elif step.branches is not None:
            for branch in step.branches:
                yield from refusals(branch)
        elif step.rule is None:
            yield step.where, operator_name(step.node)
