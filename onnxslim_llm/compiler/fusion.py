"""How many attentions, norms and rotary embeddings of a model were fused, and what kept the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxslim_llm.compiler.anchors import KINDS, Anchor, Kind, find_anchors, follow
from onnxslim_llm.rewrite.passes import Pass, Skip
from onnxslim_llm.rewrite.pipeline import PassRecord
from onnxslim_llm.runtime.signature import find_decoder

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["FusionCensus", "FusionReport"]

#: The passes that fuse each kind.
_FUSERS: dict[Kind, tuple[str, ...]] = {
    "attention": ("fuse_attention",),
    "norm": ("fuse_rms_norm", "fuse_layer_norm"),
    "rotary": ("fuse_rotary",),
}
_ALL_FUSERS = frozenset(name for names in _FUSERS.values() for name in names)
#: Nodes between what tells a site and the place that a rule reports: an attention with masks has the most.
_REACH = 10


@dataclass(frozen=True)
class FusionReport:
    """All sites of one kind.

    Attributes:
        kind: "attention", "norm" or "rotary".
        sites: How many there are, counted without the rules that fuse them.
        fused: How many of them are one operator, be it from the source.
        left: (site, reason) of the others: the rule that came nearest, where it failed, and why.
    """

    kind: Kind
    sites: int
    fused: int
    left: tuple[tuple[str, str], ...] = ()


class FusionCensus:
    """Watches a pipeline: counts sites before the first pass that fuses and after the last one.

    An observer's `pass_finished` hands on to it.

    Args:
        passes: The pipeline.
        model: The model before it. If it has a KV cache, it must have an attention for each of its layers.
    """

    def __init__(self, passes: Sequence[Pass], model: Model) -> None:
        places = [index for index, step in enumerate(passes) if step.name in _ALL_FUSERS]
        self._first, self._last = (places[0], places[-1]) if places else (-1, -1)
        decoder = find_decoder(model.to_proto("omit"))[0] if places else None
        self._layers = len(decoder.caches) // 2 if decoder is not None else 0
        self._before: list[Anchor] = find_anchors(model) if self._first == 0 else []
        self._skipped: dict[str, list[Skip]] = {}
        self._reports: tuple[FusionReport, ...] = ()

    @property
    def reports(self) -> tuple[FusionReport, ...]:
        """One report for each kind; none if the pipeline fuses nothing."""
        return self._reports

    def pass_finished(self, index: int, record: PassRecord, model: Model) -> None:
        """Take note of a pass that has run."""
        if record.name in _ALL_FUSERS:
            self._skipped[record.name] = record.skipped
        if index == self._first - 1:
            self._before = find_anchors(model)
        if index == self._last:
            self._reports = tuple(self._report(kind, model) for kind in KINDS)

    def _report(self, kind: Kind, model: Model) -> FusionReport:
        sites = [anchor for anchor in self._before if anchor.kind == kind]
        remaining = {anchor.tensor for anchor in find_anchors(model) if anchor.kind == kind and not anchor.whole}
        left = [anchor for anchor in sites if anchor.tensor in remaining]
        reasons = [(anchor.node or anchor.tensor, self._reason(anchor, model)) for anchor in left]
        number = len(sites)
        if kind == "attention" and number < self._layers:
            what = f"the KV cache has {self._layers} layers, but only {number} attentions were found"
            reasons.append(("the model", what))
            number = self._layers
        return FusionReport(kind, number, len(sites) - len(left), tuple(reasons))

    def _reason(self, anchor: Anchor, model: Model) -> str:
        """Return the near miss that is nearest to a site."""
        skips = {
            skip.where: (name, skip.reason) for name in _FUSERS[anchor.kind] for skip in self._skipped.get(name, ())
        }
        for name in _names_behind(anchor, model):
            if name in skips:
                step, reason = skips[name]
                return f"{step}: {reason}"
        tried = " and ".join(name for name in _FUSERS[anchor.kind] if name in self._skipped)
        return f"{tried}: no rule came near" if tried else f"{_FUSERS[anchor.kind][0]} did not run"


def _names_behind(anchor: Anchor, model: Model) -> list[str]:
    """Return names of nodes and tensors from a site on, nearest first."""
    tensors: list[gs.Tensor] = [
        tensor
        for graph in model.graphs()
        for node in graph.nodes
        for tensor in node.outputs[:1]
        if tensor.name == anchor.tensor
    ]
    names = [anchor.node, anchor.tensor]
    for tensor in tensors[:1]:
        for node, _ in follow(tensor, None, _REACH):
            names += [node.name, *(output.name for output in node.outputs)]
    return names
