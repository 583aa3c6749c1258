"""What a rule sees of a node: its attributes, and what is known about its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.shapes.dims import Dim

__all__ = ["NodeView"]

Value = NDArray[Any] | None


@dataclass(frozen=True)
class NodeView:
    """A node together with what is known about its inputs."""

    node: gs.Node
    shape_of: Callable[[gs.Tensor], tuple[Dim, ...] | None]
    value_of: Callable[[gs.Tensor], Value]

    def has(self, index: int) -> bool:
        """Return whether the input is given."""
        return index < len(self.node.inputs) and not self.node.inputs[index].is_empty()

    def shape(self, index: int = 0) -> tuple[Dim, ...] | None:
        """Return the shape of an input; None if it is unknown or the input is missing."""
        return self.shape_of(self.node.inputs[index]) if self.has(index) else None

    def value(self, index: int = 0) -> Value:
        """Return the content of an input, see `SymbolicValues.value_of`."""
        return self.value_of(self.node.inputs[index]) if self.has(index) else None

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.node.attrs.get(name, default)

    def ints(self, name: str, index: int) -> list[int] | None:
        """Return integers that are an attribute at old opsets and an input at new ones; None if missing or unknown."""
        if name in self.node.attrs:
            return [int(v) for v in self.node.attrs[name]]
        value = self.value(index)
        if value is None or not all(isinstance(v, int) for v in value.reshape(-1)):
            return None
        return [int(v) for v in value.reshape(-1)]
