"""Fold hidden channels that hardly vary into a bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import ArrayWeight, weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.prune.rows.cut_channels import cut_channels
from onnxslim_llm.passes.prune.rows.mean_job import MeanJob
from onnxslim_llm.products.hidden import HiddenLayer, find_hidden_layers
from onnxslim_llm.products.output_bias import add_vector, added_vector
from onnxslim_llm.products.owned_weights import Constants
from onnxslim_llm.products.selection import compile_patterns
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage
from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.statistics import Collected, StoredMoments
from onnxslim_llm.stats.transforms import Kept

__all__ = ["FoldConstantNeurons"]

Array = NDArray[Any]

_GEMM_BIAS = 2
#: Where the error is larger than allowed, so much of the channels is tried next.
_FEWER = 0.75


@dataclass(frozen=True)
class FoldConstantNeurons(Pass):
    """Leave out hidden channels that are nearly the same for every token, and add what they make on average to a bias.

    Channels that are always the same, such as those of a ReLU that never fires, go without a loss. The error of the
    others is bounded on samples that were held out of the calibration data; the bias is added behind the product if it
    has none.

    Before:
        h = Relu (MatMul (X, U[K, F]))
        Y = MatMul (h, D[F, N])
    After:
        h = Relu (MatMul (X, U[K, F']))
        Y = Add (MatMul (h, D[F', N]), b)

    Skips when:
        - what the product sums comes from anything but products and elementwise operators, such as an attention;
        - an activation on the way is read elsewhere, or is an output of the model;
        - one of the weights has several uses, is quantized already, sparse, or may be replaced by the caller;
        - no calibration data reach it;
        - fewer than `align` channels hardly vary, or the weight's name or that of its reader matches `exclude`.

    Attributes:
        limit: Largest relative error of the product's output, root mean square by that of its deviations from its
            mean, above 0; 0: only channels that are 0 for every token.
        align: The number that is left is rounded up to a multiple of this: kernels work on whole vectors.
        exclude: Regular expressions; layers whose summing weight or product has a match in its name are left alone.
    """

    name: ClassVar[str] = "fold_constant_neurons"
    group: ClassVar[str] = "prune"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.PRUNE

    limit: float = 0.001
    align: int = 32
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.limit < 1:
            what = f"limit = {self.limit} is not possible"
            raise UsageError(what, where=self.name, todo="choose at least 0 and less than 1, such as 0.001")
        if self.align < 1:
            raise UsageError(f"align = {self.align} is not possible", where=self.name, todo="choose 1 or more")
        compile_patterns(self.exclude, f"{self.name}.exclude")

    @property
    def wants_statistics(self) -> bool:
        """It works from the means and variances of the channels."""
        return True

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data.

        Raises:
            UsageError: There are none.
        """
        context.need_statistics("which channels vary is told by calibration data: there are none", self.name)

    def apply(self, model: Model, context: Context) -> Change:
        """Choose the channels; weights are cut, and biases computed, at save."""
        change = Change()
        infer_shapes(model)
        constants = Constants(model)
        exclude = compile_patterns(self.exclude, self.name)
        entries = []
        for layer in find_hidden_layers(model, change):
            name = layer.weight.name
            pattern = next((p.pattern for p in exclude if p.search(name) or p.search(layer.product.name)), None)
            assert context.statistics is not None
            moments = context.statistics.of_weight(name)
            if pattern is not None:
                change.skip(name, f"it is excluded by '{pattern}'")
            elif moments is None or moments.size != layer.size:
                change.skip(name, "no calibration data reach it")
            else:
                folded, error = self._constant(layer, moments)
                if not len(folded):
                    change.skip(name, f"fewer than {self.align} of {layer.size} channels hardly vary")
                    continue
                kept = _fold(model, constants, layer, folded, moments.load().fit)
                context.statistics = context.statistics.changed(name, Kept(kept))
                change.sites.append(name)
                entries.append({"name": name, "channels": [layer.size, len(kept)], "relative_output_error": error})
        if entries:
            change.detail.update(layers=entries)
            infer_shapes(model)
        return change

    def _constant(self, layer: HiddenLayer, moments: StoredMoments) -> tuple[NDArray[np.int64], float]:
        """Return the channels to fold, in order, and the relative error that this makes."""
        collected = moments.load()
        source = weight_of(layer.weight).view()
        weight = np.asarray(source if layer.k_axis == 0 else source.T, np.float64)
        costs = collected.fit.variance * np.square(weight).sum(axis=1)
        costs[_always_zero(collected)] = 0.0
        order = np.argsort(costs, kind="stable")
        signal = _spread(weight, np.arange(layer.size), collected.held, collected.held.mean)
        allowed = self.limit**2 * signal
        count = int(np.searchsorted(np.cumsum(costs[order]), allowed, side="right"))
        while (count := self._aligned(count, layer.size)) > 0:
            folded = np.sort(order[:count]).astype(np.int64)
            error = _spread(weight[folded], folded, collected.held, collected.fit.mean)
            if error <= allowed:
                return folded, math.sqrt(error / signal) if signal > 0 else 0.0
            count = min(int(count * _FEWER), count - 1)
        return np.zeros(0, np.int64), 0.0

    def _aligned(self, count: int, size: int) -> int:
        """Return how many of `count` channels go so that a multiple of `align`, and one at least, is left."""
        left = max(-(-(size - count) // self.align) * self.align, 1)
        return max(size - left, 0)


def _always_zero(collected: Collected) -> NDArray[np.bool_]:
    zero: NDArray[np.bool_] = (collected.fit.largest == 0) & (collected.held.largest == 0)
    return zero


def _spread(rows: Array, channels: NDArray[np.int64], moments: Moments, mean: Array) -> float:
    """Return the mean of |(x_S - m_S) W_S|^2 over the samples.

    Args:
        rows: W_S [n, N].
        channels: S [n].
        moments: Of the samples' x [K].
        mean: m [K].
    """
    seen = (moments.largest[channels] > 0) | (mean[channels] != 0)  # the others add nothing, and no rounding
    s, w = channels[seen], rows[seen]
    assert moments.gram is not None
    expected, m = moments.mean[s], mean[s]
    second = moments.gram[np.ix_(s, s)] / max(moments.count, 1)
    second += np.outer(m - expected, m - expected) - np.outer(expected, expected)
    return max(float(np.einsum("kn,kn->", w, second @ w)), 0.0)


def _fold(
    model: Model, constants: Constants, layer: HiddenLayer, folded: NDArray[np.int64], moments: Moments
) -> NDArray[np.int64]:
    """Fold channels of a layer; return those that are left."""
    source, node = weight_of(layer.weight), layer.product
    means = moments.mean[folded]
    kept = np.setdiff1d(np.arange(layer.size), folded).astype(np.int64)
    cut_channels(model, layer, kept)
    if not means.any():
        return kept
    means = means * float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else means
    columns = source.shape[1 - layer.k_axis]

    def moved(bias: Weight, name: str) -> Weight:
        return derive(MeanJob(bias, source, layer.k_axis, folded, means, name))[0]

    place = _gemm_bias(constants, layer, columns) or added_vector(constants, node, columns)
    if place is not None:
        reader, index = place
        tensor = reader.inputs[index]
        constants.put(reader, index, moved(weight_of(tensor), tensor.name))
    else:
        zeros = ArrayWeight(np.zeros(columns, source.dtype))
        add_vector(model, node, moved(zeros, f"bias after {layer.weight.name}"))
    return kept


def _gemm_bias(constants: Constants, layer: HiddenLayer, columns: int) -> tuple[gs.Node, int] | None:
    """Return the Gemm and its third input, if that is a vector that is added as it is."""
    node = layer.product
    if node.op != "Gemm" or len(node.inputs) <= _GEMM_BIAS or node.attrs.get("beta", 1.0) != 1.0:
        return None
    return (node, _GEMM_BIAS) if constants.is_vector(node.inputs[_GEMM_BIAS], columns) else None
