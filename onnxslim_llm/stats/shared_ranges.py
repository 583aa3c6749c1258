"""What one graph's calibration says, for another graph of the same model: both then work in the same codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from onnxslim_llm.stats.observe import Collector

__all__ = ["SharedRanges"]


@dataclass
class SharedRanges:
    """Collectors by the tensors that they hold for.

    A token's keys, values and hidden states are the same whether it is read with a prompt or written in a step, so the
    ranges of the first graph hold for the others. What it leaves in a cache the others then read without another
    rounding, and weights whose codes depend on the activations' scale are the same.

    The graphs are one source with other sizes, gone through the same passes: a tensor of both is known by its name and
    by the operator that makes it. Should a pass give one name to two things, the second graph's gates tell.
    """

    _found: dict[tuple[str, str, str], Collector] = field(default_factory=dict, repr=False)

    def offer(self, kind: str, tensors: Iterable[gs.Tensor], collector: Collector) -> None:
        """Keep what was observed, unless an earlier graph has observed these tensors.

        Args:
            kind: What it tells about them, such as "range".
            tensors: All that it holds for.
            collector: Filled with the calibration data.
        """
        for tensor in tensors:
            self._found.setdefault(_key(kind, tensor), collector)

    def known(self, kind: str, tensors: Iterable[gs.Tensor]) -> Collector | None:
        """Return what an earlier graph has observed of these tensors; None if nothing, or several different things."""
        found = [self._found[key] for key in (_key(kind, tensor) for tensor in tensors) if key in self._found]
        return found[0] if found and all(other is found[0] for other in found) else None


def _key(kind: str, tensor: gs.Tensor) -> tuple[str, str, str]:
    maker = tensor.inputs[0].op if isinstance(tensor, gs.Variable) and tensor.inputs else ""
    return kind, tensor.name, maker
