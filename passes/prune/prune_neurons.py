"""Leave out the hidden channels of feed-forward layers that matter least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.prune.rows.cut_channels import cut_channels
from onnxslim_llm.passes.prune.rows.refit_rows_job import RefitRowsJob
from onnxslim_llm.passes.prune.rows.refitted_rows import RefittedRows
from onnxslim_llm.products.hidden import HiddenLayer, find_hidden_layers
from onnxslim_llm.products.selection import compile_patterns
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.stats.curvature import inverse_factor
from onnxslim_llm.stats.statistics import StoredMoments
from onnxslim_llm.stats.transforms import Kept

__all__ = ["PruneNeurons"]

Array = NDArray[Any]


@dataclass(frozen=True)
class PruneNeurons(RefittedRows):
    """Leave out hidden channels of feed-forward layers, and fit the rows that are left to what all of them computed.

    Files, memory and time shrink with the share, in every runtime: no kernel needs to know of zeros.

    Before:
        h = Mul (Swish (MatMul (X, G[K, F])), MatMul (X, U[K, F]))
        Y = MatMul (h, D[F, N])
    After:
        h = Mul (Swish (MatMul (X, G[K, F'])), MatMul (X, U[K, F']))
        Y = MatMul (h, D[F', N])

    Skips when:
        - what the product sums comes from anything but products and elementwise operators, such as an attention;
        - an activation on the way is read elsewhere, or is an output of the model;
        - one of the weights has several uses, is quantized already, sparse, or may be replaced by the caller;
        - fewer than `align` channels could go, or the weight's name or that of its reader matches `exclude`.

    Attributes:
        share: Share of the channels that go, at least 0 and below 1.
        align: The number that is left is rounded to a multiple of this: kernels work on whole vectors.
        refit: With data, fit the rows that are left by least squares, where that helps on held-out samples.
        exclude: Regular expressions; layers whose summing weight or product has a match in its name are left alone.
    """

    name: ClassVar[str] = "prune_neurons"

    align: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align < 1:
            raise UsageError(f"align = {self.align} is not possible", where=self.name, todo="choose 1 or more")

    def apply(self, model: Model, context: Context) -> Change:
        """Choose the channels; the weights are cut and fitted at save."""
        change = Change()
        infer_shapes(model)
        exclude = compile_patterns(self.exclude, self.name)
        entries: list[dict[str, Any]] = []
        layers = find_hidden_layers(model, change)
        for layer in layers:
            name = layer.weight.name
            pattern = next((p.pattern for p in exclude if p.search(name) or p.search(layer.product.name)), None)
            left = self._left(layer.size)
            if pattern is not None:
                change.skip(name, f"it is excluded by '{pattern}'")
                continue
            if left == layer.size:
                change.skip(name, f"of {layer.size} channels, {self.share:.0%} are fewer than {self.align}")
                continue
            moments = context.statistics.of_weight(name) if context.statistics is not None else None
            if moments is not None and moments.size != layer.size:
                moments = None
            if self.refit and moments is None:
                change.skip(name, "no calibration data reach it: its channels are chosen by magnitude")
            kept = _best(_scores(layer, moments), left)
            fitted = None
            if self.refit and moments is not None:
                (fitted,) = derive(RefitRowsJob(weight_of(layer.weight), layer.k_axis, kept, moments, name))
            cut_channels(model, layer, kept, fitted)
            if context.statistics is not None:
                context.statistics = context.statistics.changed(name, Kept(kept))
            change.sites.append(name)
            entries.append({"name": name, "channels": [layer.size, left]})
        if entries:
            sizes = {entry["channels"][1] for entry in entries}
            alike = len(entries) == len(layers) and len(sizes) == 1
            change.detail.update(layers=entries, config={"intermediate_size": sizes.pop()} if alike else {})
            infer_shapes(model)
        return change

    def _left(self, size: int) -> int:
        left = -(-round(size * (1 - self.share)) // self.align) * self.align
        return min(max(left, 1), size)


def _scores(layer: HiddenLayer, moments: StoredMoments | None) -> Array:
    """Return what leaving out each channel costs the product's output, squared [K].

    With U the factor of H^-1, a channel j whose row w_j is made up for by the others costs ||w_j||^2 / [H^-1]_jj
    (optimal brain surgeon, Hassibi & Stork 1993, for a whole row). Without data: the norm of its row by those of its
    columns.
    """
    source = weight_of(layer.weight).view()
    rows: Array = np.square(source, dtype=np.float64).sum(axis=1 - layer.k_axis)
    if moments is not None:
        gram = moments.load().fit.gram
        factor = None if gram is None else inverse_factor(gram)
        if factor is not None:
            scores: Array = rows / np.maximum(
                np.square(factor, dtype=np.float64).sum(axis=0), np.finfo(np.float64).tiny
            )
            return scores
    for maker in layer.makers:
        weight = weight_of(maker.constant)
        if len(weight.shape) == 2:
            columns = np.square(weight.view(), dtype=np.float64).sum(axis=1 - maker.axis)
            rows = rows * columns[maker.offset : maker.offset + layer.size]
    return rows


def _best(scores: Array, count: int) -> NDArray[np.int64]:
    """Return the places of the `count` highest scores, in order; the first among equals."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)
