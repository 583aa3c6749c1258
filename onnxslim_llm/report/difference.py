"""What is different between two models without running them: operators, bytes, interface."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from onnxslim_llm.report.sizes import bytes_by_role, weight_uses

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["StructuralDifference", "structural_difference"]


@dataclass(frozen=True)
class StructuralDifference:
    """Pairs of (first, second).

    Attributes:
        ops: Operator -> numbers of nodes, those that differ.
        nodes: All nodes.
        bytes_by_role: Role -> bytes of weights.
        weight_bytes: Bytes of all weights, each distinct content once.
        opset: Domain -> versions (None: not imported), those that differ.
        inputs, outputs: Names that only one of the models has.
    """

    ops: dict[str, tuple[int, int]]
    nodes: tuple[int, int]
    bytes_by_role: dict[str, tuple[int, int]]
    weight_bytes: tuple[int, int]
    opset: dict[str, tuple[int | None, int | None]]
    inputs: tuple[tuple[str, ...], tuple[str, ...]]
    outputs: tuple[tuple[str, ...], tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def structural_difference(first: Model, second: Model) -> StructuralDifference:
    """Compare two models; no weight is read."""
    censuses = first.census(), second.census()
    roles = [bytes_by_role(weight_uses(model)) for model in (first, second)]
    opsets = [
        {item.domain: int(item.version) for item in model.graph.import_domains or []} for model in (first, second)
    ]
    return StructuralDifference(
        ops={
            op: (censuses[0][op], censuses[1][op])
            for op in sorted({*censuses[0], *censuses[1]})
            if censuses[0][op] != censuses[1][op]
        },
        nodes=(censuses[0].total(), censuses[1].total()),
        bytes_by_role={role: (roles[0].get(role, 0), roles[1].get(role, 0)) for role in {**roles[0], **roles[1]}},
        weight_bytes=(first.weight_bytes(), second.weight_bytes()),
        opset={
            domain: (opsets[0].get(domain), opsets[1].get(domain))
            for domain in sorted({*opsets[0], *opsets[1]})
            if opsets[0].get(domain) != opsets[1].get(domain)
        },
        inputs=_only(first.graph.inputs, second.graph.inputs),
        outputs=_only(first.graph.outputs, second.graph.outputs),
    )


def _only(first: Any, second: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = {tensor.name for tensor in first}, {tensor.name for tensor in second}
    return tuple(sorted(names[0] - names[1])), tuple(sorted(names[1] - names[0]))
