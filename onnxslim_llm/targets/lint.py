"""Check a model against what a target accepts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxslim_llm.concepts.concept import DOMAIN
from onnxslim_llm.ir.shapes.fixing import free_dimensions
from onnxslim_llm.rewrite.schema import normal_domain, schema_of

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from onnxslim_llm.ir.model import Model

__all__ = ["Violation", "free_sizes", "lint_model", "place_of"]


@dataclass(frozen=True)
class Violation:
    """Something that a target does not accept.

    Attributes:
        where: The node, function or domain.
        rule: What is wrong with it.
        fix: What to do about it.
    """

    where: str
    rule: str
    fix: str


def lint_model(model: Model, *, domains: Collection[str], opsets: tuple[int, int]) -> list[Violation]:
    """Return what breaks the rules, in graph order.

    Args:
        model: The model.
        domains: Domains that nodes and imports may have; model-local functions of other domains are fine.
        opsets: Oldest and newest ai.onnx version.
    """
    return [
        *_opset(model.opset() or 0, opsets),
        *_imports(model, domains),
        *(v for graph in model.all_graphs() for node in graph.nodes for v in _node(node, model, domains)),
    ]


def free_sizes(model: Model) -> Iterator[Violation]:
    """Yield the dimensions of inputs that are no numbers."""
    for where, name in free_dimensions(model.graph.inputs):
        yield Violation(where, f"the size '{name}' is not fixed", f"--shape {name}=128, or whatever it should be")


def place_of(node: gs.Node) -> str:
    """Return how messages name a node."""
    return f"{node.op} '{node.name or (node.outputs[0].name if node.outputs else '')}'"


def _opset(opset: int, allowed: tuple[int, int]) -> Iterator[Violation]:
    low, high = allowed
    if not low <= opset <= high:
        yield Violation("opset", f"ai.onnx {opset} is outside of {low} to {high}", "convert the model to another opset")


def _imports(model: Model, domains: Collection[str]) -> Iterator[Violation]:
    imported = {normal_domain(item.domain) for item in model.graph.import_domains or []}
    used = {normal_domain(node.domain) for graph in model.all_graphs() for node in graph.nodes}
    for domain in sorted(used - imported):
        yield Violation(f"domain '{domain}'", "it is used but not imported", "add it to the opset imports")
    local = {function.domain for function in model.functions}
    for domain in sorted(imported - set(domains) - local):
        if domain == DOMAIN or domain not in used:
            yield Violation(f"domain '{domain}'", "it is imported but not used", "remove the import")


def _node(node: gs.Node, model: Model, domains: Collection[str]) -> Iterator[Violation]:
    domain = normal_domain(node.domain)
    where = place_of(node)
    if domain == DOMAIN:
        yield Violation(where, "it is a concept of the compiler", "run the target's lowering")
    elif any(f.domain == node.domain and f.name == node.op for f in model.functions):
        return
    elif domain not in domains:
        allowed = ", ".join(d or "ai.onnx" for d in domains)
        yield Violation(where, f"domain '{domain}' is not among {allowed}", "choose another target")
    elif domain == "" and schema_of(node.op, "", model.opset() or 1) is None:
        yield Violation(where, f"ai.onnx {model.opset()} has no operator {node.op}", "convert the model's opset")
