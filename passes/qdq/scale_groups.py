"""Tensors that share a scale, what range each group has, and in how many bits it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights import Weight, weight_of
from onnxslim_llm.passes.qdq.nodes import QdqNode
from onnxslim_llm.products.reads import read_weight
from onnxslim_llm.stats.grid import Grid, Range
from onnxslim_llm.stats.ranges import CalibratorName, RangeCollector, make_collector
from onnxslim_llm.stats.shared_ranges import SharedRanges

__all__ = ["Groups", "ScaleGroup", "constant_of"]

#: What the collectors of groups tell, see `SharedRanges`.
_KIND = "range"
#: Bytes of a constant that are looked at at a time.
_CHUNK = 16 << 20


@dataclass
class ScaleGroup:
    """Tensors with one scale and zero point.

    Attributes:
        observed: Those whose values the data say; what only moves them is left out.
        constants: Constant operands, by name.
        fixed: Range that an operator's definition gives.
        collector: What the data say; None before the observation, or where nothing is observed.
        tensors: All of them.
    """

    observed: list[gs.Variable] = field(default_factory=list)
    constants: dict[str, Weight] = field(default_factory=dict)
    fixed: Range | None = None
    collector: RangeCollector | None = None
    tensors: list[gs.Tensor] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What the group is called in messages."""
        return self.observed[0].name if self.observed else next(iter(self.constants), "")

    def range(self, grid: Grid) -> Range:
        """Return the range that codes cover.

        Raises:
            ModelError: It is zero or not finite; the tensor is named.
        """
        found = self.fixed
        if self.collector is not None and self.collector.count:
            seen = self.collector.range(grid)
            found = seen if found is None else found.union(seen)
        for weight in self.constants.values():
            own = _content_range(weight)
            found = own if found is None else found.union(own)
        if found is None:
            raise self._error("the calibration data do not reach it")
        if found.problem and not self.observed and found == Range(0.0, 0.0):
            return Range(0.0, 1.0)  # a constant zero is exact in any step
        if found.problem:
            raise self._error(found.problem)
        return found

    def _error(self, what: str) -> ModelError:
        return ModelError(
            f"the activation cannot be quantized: {what}",
            where=f"tensor '{self.label}'",
            todo="give calibration data that exercise it, or leave its nodes in float: "
            "--set quantize_activations.exclude=[REGEX]",
        )


class Groups:
    """All scale groups of a set of nodes.

    Args:
        nodes: What is computed on integers.
    """

    def __init__(self, nodes: Sequence[QdqNode]) -> None:
        self._parent: dict[int, int] = {}
        self._tensors: dict[int, gs.Tensor] = {}
        for item in nodes:
            for tensor in tensors_of(item):
                self._find(tensor)
            if item.rule.same_scale:
                first, *others = list(tensors_of(item)) or [None]
                for other in others:
                    self._join(first, other)
        self.groups: dict[int, ScaleGroup] = {}
        movers = {id(item.node) for item in nodes if item.rule.same_scale}
        ranges = {id(item.node.outputs[i]): item.rule.result_range for item in nodes for i in item.results}
        for tensor in self._tensors.values():
            self._describe(self.groups.setdefault(self._root(tensor), ScaleGroup()), tensor, movers, ranges)

    def of(self, tensor: gs.Tensor) -> ScaleGroup:
        """Return the group of a quantized tensor."""
        return self.groups[self._root(tensor)]

    def collectors(
        self, calibrator: CalibratorName, percentile: float, shared: SharedRanges | None = None
    ) -> dict[str, RangeCollector]:
        """Return a collector for each tensor to observe, by name; the tensors of a group share one.

        Args:
            calibrator: How ranges will be chosen.
            percentile: For the calibrator of that name.
            shared: Groups that another graph has observed take over what it has seen; the others are told to it.
        """
        found: dict[str, RangeCollector] = {}
        for group in self.groups.values():
            if not group.observed:
                continue
            known = None if shared is None else shared.known(_KIND, group.tensors)
            if isinstance(known, RangeCollector):
                group.collector = known
                continue
            group.collector = make_collector(calibrator, percentile)
            found.update((tensor.name, group.collector) for tensor in group.observed)
            if shared is not None:
                shared.offer(_KIND, group.tensors, group.collector)
        return found

    def adopt(self, earlier: Groups) -> None:
        """Take over what the groups of a larger set of nodes have observed."""
        for tensor_id, tensor in self._tensors.items():
            if tensor_id in earlier._tensors:
                self.of(tensor).collector = earlier.of(tensor).collector

    def _describe(
        self,
        group: ScaleGroup,
        tensor: gs.Tensor,
        movers: set[int],
        ranges: Mapping[int, tuple[float, float] | None],
    ) -> None:
        group.tensors.append(tensor)
        content = constant_of(tensor)
        fixed = ranges.get(id(tensor))
        if content is not None:
            group.constants[tensor.name] = content
        elif fixed is not None:
            own = Range(*fixed)
            group.fixed = own if group.fixed is None else group.fixed.union(own)
        elif not (tensor.inputs and id(tensor.inputs[0]) in movers):
            group.observed.append(tensor)

    def _find(self, tensor: gs.Tensor) -> int:
        self._tensors.setdefault(id(tensor), tensor)
        self._parent.setdefault(id(tensor), id(tensor))
        return self._root(tensor)

    def _root(self, tensor: gs.Tensor) -> int:
        key = id(tensor)
        while self._parent[key] != key:
            self._parent[key] = self._parent[self._parent[key]]
            key = self._parent[key]
        return key

    def _join(self, first: gs.Tensor | None, other: gs.Tensor | None) -> None:
        if first is not None and other is not None:
            self._parent[self._find(other)] = self._find(first)


def tensors_of(item: QdqNode) -> Iterable[gs.Tensor]:
    """Return the tensors of a node that are quantized: inputs, then results."""
    return [*(item.node.inputs[i] for i in item.inputs), *(item.node.outputs[i] for i in item.results)]


def constant_of(tensor: gs.Tensor) -> Weight | None:
    """Return the content of a constant operand, or None."""
    read = read_weight(tensor)
    return None if read is None or read.transposed else weight_of(read.constant)


def _content_range(weight: Weight) -> Range:
    flat = weight.view().reshape(-1)
    low, high = 0.0, 0.0
    for start in range(0, flat.size, _CHUNK):
        piece = flat[start : start + _CHUNK].astype(np.float32)
        low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    weight.release()
    return Range(low, high)
