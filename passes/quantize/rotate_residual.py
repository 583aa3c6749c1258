"""Rotate the residual stream, so that no channel of what products read is much larger than the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.opset import CONCEPT_OPSET
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.quantize.codes.columns import columns_of
from onnxslim_llm.passes.quantize.codes.trial import quickly_coded
from onnxslim_llm.passes.quantize.folding.fold_sites import find_fold_sites
from onnxslim_llm.passes.quantize.folding.following import following_quantizer
from onnxslim_llm.passes.quantize.rotation.fold_rotation import RotationFold
from onnxslim_llm.passes.quantize.rotation.residual_stream import (
    ResidualStream,
    Stuck,
    find_residual_stream,
    is_uniform,
)
from onnxslim_llm.passes.quantize.rotation.rotate_step import Rotate
from onnxslim_llm.passes.quantize.rotation.rotation import Rotated, Rotation
from onnxslim_llm.passes.quantize.rotation.rotation_gain import head_errors, relative_errors
from onnxslim_llm.products.owned_weights import Constants
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from onnxslim_llm.concepts.block_weights import WeightScheme
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["RotateResidual"]

Array = NDArray[Any]
#: Share by which the errors must fall: less says nothing about the whole model.
_LEAST_GAIN = 0.02
#: Columns of a rotation that are looked at, and what rounding scales to float16 changes: 2^-11 of a weight at most.
_TRIED, _EXACT = 64, 1e-3
Tied = Literal["multiply", "untie", "leave"]


@dataclass(frozen=True)
class RotateResidual(Pass):
    """Rotate the residual stream by a Hadamard matrix with random signs, folded into all weights around it (QuaRot).

    With x' = x R and R R^T = 1 a norm without weight gives norm(x') = norm(x) R. So weights of norms are folded into
    the products behind them, whose rows are multiplied by R^T, and whatever writes to the stream (embeddings, output
    projections, biases) is multiplied by R. Outliers in single channels, which few-bit weights fit badly, spread over
    all of them. The results stay the same. Layer norms become RMS norms: their mean is subtracted in what writes to the
    stream. A bias of a norm becomes an addition behind it.

    The signs follow the seed of the compile. Where no Hadamard matrix has the size, a random orthogonal factor is used.

    Before:
        h = Gather (E, ids)
        n = onnxslim_llm.RMSNorm <epsilon> (h, g)
        q = MatMul (n, W)
    After:
        h = Gather (E_R, ids)
        n = onnxslim_llm.RMSNorm <epsilon> (h, ones)
        q = MatMul (n, Rt_g_W)

    Skips when:
        - no table of embeddings is looked up, or no norm reads the residual stream;
        - something else than additions of products, look-ups and constant vectors writes to the stream: a norm, as in
          post-norm models and Gemma 2 and 3, or a gate;
        - something else than norms, products and additions reads it, or the result of one of its norms;
        - the stream, or the result of a norm, is an input or output of the model;
        - a weight is used elsewhere, too, is an input or output of the model, or no dense float matrix;
        - a norm's weight is no constant vector, or has zeros, or norms of both kinds read the stream;
        - the classifier shares its weight with the embedding, the weight of the norm before it is not the same for all
          channels, and `tied` is "leave";
        - the classifier is tied, `tied` is "multiply", and quantize_weights would round the rotation itself: methods
          that take a block's range do, and 2 bits without zero points;
        - a layer norm is in a model older than opset 18;
        - `only_if_better` is on, and the error does not become smaller;
        - heads: the attention is not fused, what makes its values is no product, or its cache is to be int8.

    Attributes:
        tied: What to do where the classifier shares its weight with the embedding, so that the weight of the last norm
            cannot be folded into it. "multiply" keeps the table as it is and multiplies by R behind the look-up, and by
            R^T before the classifier: two products of D x D, which few bits hold exactly. "untie" stores the classifier
            as a weight of its own. "leave" gives up.
        heads: Rotate the values of attentions, too, each head by itself. What a KV cache holds of them is rotated then:
            caches cannot be exchanged with the source model.
        only_if_better: Rotate only where the quantize_weights that follows makes a smaller error with it, on samples of
            the calibration data that were held out: the sum of the relative squared errors of all products that are
            quantized for the stream, of those around the attention for heads.
    """

    name: ClassVar[str] = "rotate_residual"
    group: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.ROTATE

    tied: Tied = "multiply"
    heads: bool = True
    only_if_better: bool = True

    def __post_init__(self) -> None:
        if self.tied not in ("multiply", "untie", "leave"):
            what = f"tied = {self.tied!r} is not possible"
            raise UsageError(what, where=self.name, todo="choose multiply, untie or leave")

    @property
    def wants_statistics(self) -> bool:
        """It works from the moments of the inputs where it is tried before it is done."""
        return self.only_if_better

    def requires(self, model: Model, context: Context) -> None:
        """Check that a rotation can be tried.

        Raises:
            UsageError: There are no data, or no quantizer.
        """
        if self.only_if_better:
            what = "a rotation is tried on calibration data, and there are none"
            context.need_statistics(what, self.name, "only_if_better = false")
        if self.only_if_better and following_quantizer(context) is None:
            todo = "put quantize_weights after it, or only_if_better = false"
            raise UsageError("no quantize_weights follows", where=self.name, todo=todo)

    def apply(self, model: Model, context: Context) -> Change:
        """Rotate the stream of the top graph, and the values of its attentions."""
        change = Change()
        quantizer = following_quantizer(context)
        schemes = quantizer.plan(model, context) if quantizer is not None and self.only_if_better else None
        twin, after = model.copy(), replace(context)
        try:
            stream = find_residual_stream(twin)
            tied = self._checked(twin, stream)
        except Stuck as stuck:
            change.skip(stuck.where, stuck.reason)
        else:
            rotation = Rotation(stream.size, context.seed)
            fold = RotationFold(twin, after, stream, rotation, tied)
            fold.fold()
            inexact = quantizer is not None and _are_rounded(fold.added, quantizer.plan(twin, after))
            errors = None
            if schemes is not None:
                errors = (relative_errors(model, context, schemes), relative_errors(twin, after, schemes))
            if inexact:
                change.skip("residual stream", "quantize_weights would round the added products by the rotation itself")
            elif errors is None or _gains(errors):
                model.graph, context.statistics = twin.graph, after.statistics
                model.refresh_names()
                change.sites.append("residual stream")
                change.detail.update(
                    size=stream.size,
                    hadamard=rotation.is_hadamard,
                    norms=len(stream.norms),
                    writers=len(stream.writers) + len(stream.tables),
                    tied=tied,
                )
            else:
                change.skip("residual stream", _worse(errors))
            if errors is not None:
                change.detail["error_ratio"] = round(errors[1] / errors[0], 4) if errors[0] else 1.0
        if self.heads:
            _rotate_heads(model, context, change, schemes)
        return change

    def _checked(self, model: Model, stream: ResidualStream) -> str:
        """Return what becomes of a tied classifier: "", "rotate", "multiply" or "untie"."""
        if stream.centred and (model.opset() or 0) < CONCEPT_OPSET:
            where = stream.norms[0].node.name or stream.norms[0].node.outputs[0].name
            raise Stuck(where, f"an RMS norm takes the place of this layer norm: opset {CONCEPT_OPSET} is needed")
        read = stream.tied
        if read is None:
            return ""
        if not stream.centred and is_uniform(weight_of(read.node.inputs[1]).load()):
            return "rotate"
        if self.tied == "leave":
            reason = "the classifier shares its weight with the embedding, and the norm before it has a weight"
            raise Stuck(stream.tables[0].name, reason)
        return self.tied


def _are_rounded(matrices: Sequence[gs.Constant], schemes: Mapping[str, WeightScheme]) -> bool:
    """Return whether few bits do not hold some of the matrices exactly: a search finds their two values."""
    for tensor in matrices:
        if tensor.name in schemes:
            columns = columns_of(weight_of(tensor), 0, _TRIED)
            change = columns - quickly_coded(columns, schemes[tensor.name], np.ones(columns.shape[1]))
            if np.linalg.norm(change) > _EXACT * np.linalg.norm(columns):
                return True
    return False


def _gains(errors: tuple[float, float]) -> bool:
    return errors[1] < errors[0] * (1 - _LEAST_GAIN)


def _worse(errors: tuple[float, float]) -> str:
    ratio = errors[1] / errors[0] if errors[0] else 1.0
    return f"on samples that were held out the error becomes {ratio:.3f} times what it is"


def _rotate_heads(model: Model, context: Context, change: Change, schemes: Mapping[str, WeightScheme] | None) -> None:
    """Rotate each head's values, and back in the product that reads what the attention makes of them."""
    unfit = Change()
    constants = Constants(model)
    for site in find_fold_sites(model, unfit):
        if site.kind != "values":
            continue
        if not site.mixable:
            change.skip(site.where, "what makes the values is no product alone")
            continue
        if site.cache and context.cache_ranges is not None and site.cache in context.cache_ranges:
            change.skip(site.where, "the ranges of an int8 cache were measured without the rotation")
            continue
        node = next(n for n in model.graph.nodes if any(t.name == site.where for t in n.outputs))
        width = site.products[0].rows // int(node.attrs["q_num_heads"])
        rotation = Rotation(width, context.seed)
        if schemes is not None:
            errors = head_errors(model, context, site, rotation, schemes)
            if not _gains(errors):
                change.skip(site.where, _worse(errors))
                continue
        for product in site.products:
            product.change(Rotate(product.k_axis, rotation))
            if context.statistics is not None:
                context.statistics = context.statistics.changed(product.name, Rotated(rotation, product.rows))
        for maker in site.makers:
            constants.change(maker.node, maker.index, Rotate(maker.axis, rotation))
        change.sites.append(site.where)
