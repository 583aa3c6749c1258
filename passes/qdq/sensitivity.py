"""What rounding the inputs of a node costs its result, from what was observed; nothing is run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.weights import Weight
from onnxslim_llm.passes.qdq.codings import Width
from onnxslim_llm.passes.qdq.nodes import QdqNode, weight_axis
from onnxslim_llm.passes.qdq.scale_groups import Groups
from onnxslim_llm.stats.observe import Collector
from onnxslim_llm.stats.shared_ranges import SharedRanges

__all__ = ["Power", "Together", "powers_of_results", "result_quality", "with_makers"]

#: What the collectors of results tell, see `SharedRanges`.
_KIND = "power"
#: Bytes of a weight that are looked at at a time.
_CHUNK = 16 << 20
#: Decibels of a result that is not disturbed at all.
_EXACT = 200.0
#: Their results move as much as their inputs do, relative to 1.
_OF_ANGLES = ("Sin", "Cos")


@dataclass
class Power:
    """Mean square of a tensor."""

    count: int = 0
    square: float = 0.0

    def add(self, values: NDArray[Any]) -> None:
        """Take in one sample."""
        flat = np.asarray(values, np.float32).reshape(-1)
        self.count += flat.size
        self.square += float(np.einsum("i,i->", flat, flat, dtype=np.float64))

    @property
    def mean(self) -> float:
        """Mean of the squares."""
        return self.square / max(self.count, 1)


@dataclass
class Together:
    """Several collectors of one tensor."""

    parts: Sequence[Collector] = field(default_factory=tuple)

    def add(self, values: NDArray[Any]) -> None:
        """Hand a sample to all of them."""
        for part in self.parts:
            part.add(values)


def powers_of_results(
    nodes: Sequence[QdqNode], shared: SharedRanges | None = None
) -> tuple[dict[str, Power], dict[str, Power]]:
    """Return the powers of the results of products with weights, by name, and those of them that must be observed.

    Args:
        nodes: What is computed on integers.
        shared: Results that another graph has observed have the power that they had there.
    """
    powers: dict[str, Power] = {}
    unknown: dict[str, Power] = {}
    for item in nodes:
        if not item.is_product or item.weight is None:
            continue
        result = item.node.outputs[0]
        name = result.name
        known = None if shared is None else shared.known(_KIND, [result])
        if isinstance(known, Power):
            powers[name] = known
            continue
        powers[name] = unknown[name] = Power()
        if shared is not None:
            shared.offer(_KIND, [result], powers[name])
    return powers, unknown


def result_quality(item: QdqNode, groups: Groups, width: Width, powers: Mapping[str, Power]) -> float:
    """Return the signal-to-noise ratio in dB of a node's result when its inputs are rounded to codes of a width.

    Rounding errors are taken as independent. Those e of the input of Y = X W with W[K, N] have in Y the power
    e² |W|² / N, which is set against the power of Y: an input may have large channels that reach nothing. Those of an
    angle count as they are, however large the angle. For other nodes it is the sum of the errors relative to their
    inputs.
    """
    power = powers.get(item.node.outputs[0].name)
    if item.weight is not None and power is not None and item.inputs:
        gain = _square_sum(item.weight) / max(_channels(item), 1)
        noise = _error(item.node.inputs[item.inputs[0]], groups, width)[0] * gain
        return _decibels(power.mean, noise)
    if item.node.op in _OF_ANGLES and item.inputs:
        return _decibels(1.0, _error(item.node.inputs[item.inputs[0]], groups, width)[0])
    ratio = 0.0
    for i in item.inputs:
        error, square = _error(item.node.inputs[i], groups, width)
        ratio += error / square if square else 0.0
    return _decibels(1.0, ratio)


def with_makers(sensitive: Sequence[QdqNode], nodes: Sequence[QdqNode]) -> set[int]:
    """Return the identities of sensitive nodes and of those that make their inputs, through what only moves data.

    A narrow result read in wider codes is no better than it was.
    """
    by_id = {id(item.node): item for item in nodes}
    found: set[int] = set()
    queue = [(item, True) for item in sensitive]
    while queue:
        item, chosen = queue.pop()
        if not item.rule.same_scale:
            found.add(id(item.node))
        if not (chosen or item.rule.same_scale):
            continue
        for i in item.inputs:
            for maker in item.node.inputs[i].inputs:
                if id(maker) in by_id and id(maker) not in found:
                    queue.append((by_id[id(maker)], False))
    return found


def _error(tensor: gs.Tensor, groups: Groups, width: Width) -> tuple[float, float]:
    """Return the mean squared error of coding a tensor, and its mean square; (0, 0) where nothing was observed."""
    group = groups.of(tensor)
    if group.collector is None or not group.collector.count:
        return 0.0, 0.0
    return group.collector.error(width.grid, group.range(width.grid)), group.collector.mean_square


def _channels(item: QdqNode) -> int:
    assert item.weight is not None
    return item.weight.shape[weight_axis(item)]


def _square_sum(weight: Weight) -> float:
    flat, total = weight.view().reshape(-1), 0.0
    for start in range(0, flat.size, _CHUNK):
        piece = flat[start : start + _CHUNK].astype(np.float32)
        total += float(np.einsum("i,i->", piece, piece, dtype=np.float64))
    weight.release()
    return total


def _decibels(signal: float, noise: float) -> float:
    if noise <= 0 or signal <= 0:
        return _EXACT if noise <= 0 else 0.0
    return float(10 * np.log10(signal / noise))
