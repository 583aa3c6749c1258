"""What an operator's rule gets to see of the node that it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Call", "Rule"]


@dataclass(frozen=True)
class Call:
    """One node, ready to be computed.

    Attributes:
        op: The operator.
        where: Name of the node, for messages.
        opset: Version of the operator's domain.
        inputs: None where one is omitted.
        attributes: With the schema's defaults where the node has none.
        outputs: How many results there are.
        types: ONNX element types of the inputs as far as the graph says them: some are wider here.
    """

    op: str
    where: str
    opset: int
    inputs: Sequence[Tensor | None]
    attributes: Mapping[str, Any]
    outputs: int
    types: Sequence[int | None] = ()

    def input(self, index: int) -> Tensor:
        """Return an input that must be there."""
        found = self.optional(index)
        assert found is not None, f"{self.where}: input {index} of {self.op} is missing"
        return found

    def optional(self, index: int) -> Tensor | None:
        """Return an input, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def given(self) -> list[Tensor]:
        """Return the inputs that are there."""
        return [tensor for tensor in self.inputs if tensor is not None]

    def numbers(self, index: int, attribute: str = "") -> list[int] | None:
        """Return integers that newer opsets have as an input and older ones as an attribute; None if in neither."""
        found = self.attributes.get(attribute)
        if found is not None:
            return [int(number) for number in found]
        tensor = self.optional(index)
        return None if tensor is None else [int(number) for number in tensor.reshape(-1).tolist()]


#: Computes the results of a node: one tensor, or all of them.
Rule = Callable[[Call], "Tensor | Sequence[Tensor]"]
