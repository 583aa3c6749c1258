"""Masks of attention in a form that few bits can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.passes.lower.npu.legal_bias import HIDES, LegalBiases, hides, producer_of
from onnxslim_llm.rewrite.edit import Builder, redirect, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["LegalizeMasks"]


@dataclass(frozen=True)
class LegalizeMasks(Pass):
    """Hide keys from attention with one bias of moderate size, instead of with infinity or the lowest float.

    A tensor of scores that holds -3e38 leaves nothing of 8 or 16 bits for the scores themselves. What the masks of a
    layer hide becomes one tensor between `lowest` and 0, which layers share: conditions become numbers, so that nothing
    selects by booleans. A hidden key then weighs e^lowest times what it would weigh if it were seen: with scores that
    differ by less than 80, less than float32 resolves. Queries that see no key at all give what the scores give, where
    they gave a mean or zeros: such rows are padding, and nobody reads them.

    Before:
        seen = Where (causal, scores, -3.4e38)
        weights = Softmax (Add (seen, padding))
    After:
        bias = Min (causal_bias, padding_bias)
        weights = Softmax (Add (scores, bias))
    Skips when:
        - what is added to the scores has no elements that hide: it is a bias of the model's own
        - something else reads the masked scores.

    Attributes:
        lowest: Bias of hidden keys.
    """

    name: ClassVar[str] = "legalize_masks"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # without it few bits hold no scores

    lowest: float = -100.0

    def __post_init__(self) -> None:
        if not HIDES < self.lowest < 0:
            todo = f"give a number between {HIDES:g} and 0"
            raise UsageError(f"lowest is {self.lowest}", where=self.name, todo=todo)

    def apply(self, model: Model, context: Context) -> Change:
        """Rewrite the masks in front of every softmax."""
        change = Change()
        infer_shapes(model)
        outputs = graph_output_ids(model)
        for graph in model.graphs():
            makers: dict[np.dtype[np.generic], LegalBiases] = {}
            op = Builder(model, "mask")
            before: list[gs.Node] = []
            for node in [node for node in graph.nodes if node.op == "Softmax" and not node.domain]:
                scores = node.inputs[0]
                if scores.dtype is None:
                    continue
                dtype = np.dtype(scores.dtype)
                before += _Site(node, makers.setdefault(dtype, LegalBiases(op, self.lowest, dtype)), outputs).rewrite(
                    op, change
                )
            if not before:
                continue
            graph.nodes[:0] = op.nodes
            dead = {id(n) for n in remove_dead([*before, *op.nodes], outputs)}
            graph.nodes[:] = [n for n in graph.nodes if id(n) not in dead]
            sort_nodes(graph)
        model.refresh_names()
        return change


class _Site:
    """One softmax and the masks in front of it."""

    def __init__(self, softmax: gs.Node, biases: LegalBiases, outputs: set[int]) -> None:
        self._softmax = softmax
        self._biases = biases
        self._outputs = outputs
        self._found: list[gs.Tensor] = []
        self._replaced: list[gs.Node] = []

    def rewrite(self, op: Builder, change: Change) -> list[gs.Node]:
        """Return the nodes that are no longer needed here."""
        where = self._softmax.name or self._softmax.outputs[0].name
        scores, reason = self._scores()
        if not self._found:
            if reason:
                change.skip(where, reason)
            return []
        masked = op.Add(scores, self._biases.merged(self._found))
        masked.dtype, masked.shape = scores.dtype, self._softmax.inputs[0].shape
        self._softmax.inputs[0] = masked
        self._drop_guard()
        change.sites.append(where)
        if reason:
            change.skip(where, reason)
        return self._replaced

    def _scores(self) -> tuple[gs.Tensor, str]:
        """Return the scores without masks, and why the search ended there if that is worth telling."""
        tensor = self._softmax.inputs[0]
        while True:
            node = producer_of(tensor)
            if node is None or node.op not in ("Where", "Add"):
                return tensor, ""
            if len(tensor.outputs) > 1 or id(tensor) in self._outputs:
                masks = node.op == "Where" and any(hides(t) for t in node.inputs[1:])
                return tensor, f"something else reads '{tensor.name}'" if masks else ""
            rest = self._unmask(node)
            if rest is None:
                return tensor, ""
            self._replaced.append(node)
            tensor = rest

    def _unmask(self, node: gs.Node) -> gs.Tensor | None:
        if node.op == "Where":
            condition, first, second = node.inputs
            if hides(second):
                self._found.append(self._biases.of_condition(condition, True))
                return first
            if hides(first):
                self._found.append(self._biases.of_condition(condition, False))
                return second
            return None
        for scores, mask in (node.inputs, reversed(list(node.inputs))):
            bias = self._biases.of_mask(mask)
            if bias is not None:
                self._found.append(bias)
                return scores
        return None

    def _drop_guard(self) -> None:
        """Remove what turns the NaN of rows without keys into zeros: there are none any more."""
        weights = self._softmax.outputs[0]
        for user in list(weights.outputs):
            if user.op != "Where" or user.domain or user.inputs[2] is not weights:
                continue
            test = producer_of(user.inputs[0])
            if test is not None and test.op == "IsNaN" and test.inputs[0] is weights:
                if id(user.outputs[0]) in self._outputs:
                    continue
                self._replaced += [user, test]
                redirect(user.outputs[0], weights)
