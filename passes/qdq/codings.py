"""The codes of every quantized tensor: type, scale and zero point, in the width that its producer works in."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.passes.qdq.nodes import QdqNode
from onnxslim_llm.passes.qdq.scale_groups import Groups
from onnxslim_llm.stats.grid import Grid, grid_of
from onnxslim_llm.targets.qdq_rules import ActivationType, QdqRules

__all__ = ["Coding", "Codings", "Width", "width_of"]

_BITS = {"uint8": 8, "int8": 8, "uint16": 16, "int16": 16}


@dataclass(frozen=True)
class Width:
    """An element type of activations and its codes."""

    kind: ActivationType
    grid: Grid

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _BITS[self.kind]


@dataclass(frozen=True)
class Coding:
    """How one tensor is coded: value = (code - zero) * scale."""

    width: Width
    scale: np.float32
    zero: int

    @property
    def zero_point(self) -> np.ndarray:
        """The zero point as a scalar of the codes' type."""
        return np.array(self.zero, self.width.kind)


def width_of(rules: QdqRules, bits: int, wanted: ActivationType | None, symmetric: bool) -> Width | None:
    """Return the target's type of activations with so many bits; None if it has none.

    Args:
        rules: Of the target; its first fitting type is preferred.
        bits: 8 or 16.
        wanted: Taken if the target has it.
        symmetric: Zero points in the middle, as asked for.
    """
    fitting = [kind for kind in rules.activations if _BITS[kind] == bits]
    if not fitting:
        return None
    kind = wanted if wanted in fitting else fitting[0]
    return Width(kind, grid_of(kind, symmetric or rules.activation_symmetric))


class Codings:
    """Chooses and remembers.

    Args:
        nodes: What is computed on integers.
        groups: Their tensors.
        narrow: The usual width.
        wide: That of sensitive nodes.
        sensitive: Identities of the nodes that get it.
    """

    def __init__(
        self, nodes: Sequence[QdqNode], groups: Groups, narrow: Width, wide: Width, sensitive: Collection[int]
    ) -> None:
        self._groups = groups
        self._narrow, self._wide = narrow, wide
        self._made: dict[tuple[int, ActivationType], Coding] = {}
        self._wide_groups = _wide_groups(nodes, groups, sensitive)
        self._sensitive = sensitive

    def stored(self, tensor: gs.Tensor) -> Coding:
        """Return how a tensor is coded where it is made."""
        return self._coding(tensor, self._wide if id(self._groups.of(tensor)) in self._wide_groups else self._narrow)

    def read(self, item: QdqNode, tensor: gs.Tensor) -> Coding:
        """Return how a node wants to read a tensor."""
        if item.rule.same_scale:
            return self.stored(tensor)
        return self._coding(tensor, self._wide if id(item.node) in self._sensitive else self._narrow)

    def _coding(self, tensor: gs.Tensor, width: Width) -> Coding:
        group = self._groups.of(tensor)
        key = (id(group), width.kind)
        if key not in self._made:
            scale, zero = width.grid.parameters(group.range(width.grid))
            if tensor.dtype == np.float16:  # the scale is stored in the tensor's type
                scale = np.float32(max(np.float16(scale), np.finfo(np.float16).tiny))
            self._made[key] = Coding(width, scale, zero)
        return self._made[key]


def _wide_groups(nodes: Sequence[QdqNode], groups: Groups, sensitive: Collection[int]) -> set[int]:
    """A group is wide if something that computes one of its tensors is, or, where nothing does, something reads it."""
    makers: dict[int, bool] = {}
    readers: dict[int, bool] = {}
    for item in nodes:
        if item.rule.same_scale:
            continue
        wide = id(item.node) in sensitive
        for i in item.results:
            key = id(groups.of(item.node.outputs[i]))
            makers[key] = makers.get(key, False) or wide
        for i in item.inputs:
            key = id(groups.of(item.node.inputs[i]))
            readers[key] = readers.get(key, False) or wide
    return {key for key in {*makers, *readers} if makers.get(key, readers.get(key, False))}


def float_type(tensor: gs.Tensor) -> int:
    """Return the element type that a tensor's scale is stored in."""
    return int(TensorProto.FLOAT16 if tensor.dtype == np.float16 else TensorProto.FLOAT)
