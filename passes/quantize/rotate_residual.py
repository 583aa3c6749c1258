"""Rotate the residual stream, so that no channel of what products read is much larger than the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.concepts.concept import replace_nodes
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.concepts.opset import CONCEPT_OPSET
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.weights import constant, weight_of
from onnxslim_llm.passes.quantize.fold_sites import Constants, Product, find_fold_sites
from onnxslim_llm.passes.quantize.residual_stream import (
    NormRead,
    ResidualStream,
    Stuck,
    find_residual_stream,
    is_uniform,
)
from onnxslim_llm.passes.quantize.rotation import Rotated, Rotation
from onnxslim_llm.passes.quantize.transform_job import Centre, Rotate, Scale, Step, transformed
from onnxslim_llm.rewrite.edit import Builder, detach
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage
from onnxslim_llm.stats.transforms import Scaled

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["RotateResidual"]

Array = NDArray[Any]
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
        - a layer norm is in a model older than opset 18;
        - heads: the attention is not fused, what makes its values is no product, or its cache is to be int8.

    Attributes:
        tied: What to do where the classifier shares its weight with the embedding, so that the weight of the last norm
            cannot be folded into it. "multiply" keeps the table as it is and multiplies by R behind the look-up, and by
            R^T before the classifier: two products of D x D, which few bits hold exactly. "untie" stores the classifier
            as a weight of its own. "leave" gives up.
        heads: Rotate the values of attentions, too, each head by itself. What a KV cache holds of them is rotated then:
            caches cannot be exchanged with the source model.
    """

    name: ClassVar[str] = "rotate_residual"
    group: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.ROTATE

    tied: Tied = "multiply"
    heads: bool = True

    def __post_init__(self) -> None:
        if self.tied not in ("multiply", "untie", "leave"):
            what = f"tied = {self.tied!r} is not possible"
            raise UsageError(what, where=self.name, todo="choose multiply, untie or leave")

    def apply(self, model: Model, context: Context) -> Change:
        """Rotate the stream of the top graph, and the values of its attentions."""
        change = Change()
        try:
            stream = find_residual_stream(model)
            tied = self._checked(model, stream)
        except Stuck as stuck:
            change.skip(stuck.where, stuck.reason)
        else:
            rotation = Rotation(stream.size, context.seed)
            _Folding(model, context, stream, rotation, tied).fold()
            change.sites.append("residual stream")
            change.detail.update(
                size=stream.size,
                hadamard=rotation.is_hadamard,
                norms=len(stream.norms),
                writers=len(stream.writers) + len(stream.tables),
                tied=tied,
            )
        if self.heads:
            _rotate_heads(model, context, change)
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


class _Folding:
    """Folds one rotation into everything around a stream."""

    def __init__(self, model: Model, context: Context, stream: ResidualStream, rotation: Rotation, tied: str) -> None:
        self.model, self.context, self.stream, self.rotation, self.tied = model, context, stream, rotation, tied
        self.constants = Constants(model)
        self.replaced: dict[int, list[gs.Node]] = {}
        self.removed: list[gs.Node] = []  # keeps them alive, so that their ids stay theirs
        self.ones: dict[str, gs.Constant] = {}

    def fold(self) -> None:
        """Do it."""
        stream = self.stream
        for product in stream.writers:
            product.change(*self._written(1 - product.k_axis))
        for node, index in stream.biases:
            self.constants.change(node, index, *self._written(len(node.inputs[index].shape) - 1))
        for product in stream.direct:
            self._rotate_rows(product, None)
        kept = stream.tied.tied if stream.tied is not None else None
        for read in stream.norms:
            self._norm(read)
        for table in stream.tables:
            if self.tied == "multiply" and kept is not None and table is kept.constant:
                continue
            table.values = transformed(weight_of(table), table.name, *self._written(1))
        if self.tied == "multiply" and kept is not None:
            for node in stream.lookups:
                if node.inputs[0] is kept.constant:
                    self._multiply_lookup(node)
        replace_nodes(self.model, self.replaced)

    def _written(self, axis: int) -> tuple[Step, ...]:
        """Return what is done to the vectors that are added to the stream."""
        rotate = Rotate(axis, self.rotation)
        return (Centre(axis), rotate) if self.stream.centred else (rotate,)

    def _rotate_rows(self, product: Product, weight: Array | None) -> None:
        """Fold the weight of a norm, if there is one, and the rotation into a product that reads the stream."""
        axis = product.k_axis
        rotated = Rotated(self.rotation, self.stream.size)
        scaling = () if weight is None else (Scaled(1 / weight),)
        product.change(*(() if weight is None else (Scale(axis, weight),)), Rotate(axis, self.rotation))
        if self.context.statistics is not None:
            self.context.statistics = self.context.statistics.changed(product.name, *scaling, rotated)

    def _norm(self, read: NormRead) -> None:
        node = read.node
        scale = weight_of(node.inputs[1])
        weight = scale.load().astype(np.float64).reshape(-1)
        if read.tied is not None and self.tied == "rotate":  # the same factor for all channels stays where it is
            for product in (*read.products, read.tied):
                if product is not read.tied:
                    product.change(Rotate(product.k_axis, self.rotation))
                if self.context.statistics is not None:
                    rotated = Rotated(self.rotation, self.stream.size)
                    self.context.statistics = self.context.statistics.changed(product.name, rotated)
            return
        for product in read.products:
            self._rotate_rows(product, weight)
        if read.tied is not None and self.tied == "untie":
            self._rotate_rows(self._untied(read.tied), weight)
        kind = str(scale.dtype)
        if kind not in self.ones:
            ones = np.ones(self.stream.size, scale.dtype)
            self.ones[kind] = constant(self.model.fresh_name("ones"), ones)
        result = self._plain_norm(node, weight, self.ones[kind])
        if read.tied is not None and self.tied == "multiply":
            self._multiply_before(read.tied, result, weight, scale.dtype)

    def _plain_norm(self, node: gs.Node, weight: Array, ones: gs.Constant) -> gs.Node:
        """Make a norm one without weight, and return the node that makes its result."""
        if RMS_NORM.is_call(node):
            node.inputs[1] = ones
            return node
        inputs, output = list(node.inputs), node.outputs[0]
        epsilon = float(node.attrs.get("epsilon", 1e-5))
        detach(node)
        self.removed.append(node)
        call = RMS_NORM.call(self.model, node.name, [inputs[0], ones], [output], {"epsilon": epsilon})
        nodes = [call]
        if len(inputs) > 2 and not inputs[2].is_empty():
            op = Builder(self.model, f"{node.name or output.name}/bias")
            call.outputs[0] = gs.Variable(self.model.fresh_name(f"{output.name}_unbiased"), output.dtype, output.shape)
            steps = (Scale(len(inputs[2].shape) - 1, 1 / weight), Rotate(len(inputs[2].shape) - 1, self.rotation))
            shift = op.constant(transformed(weight_of(inputs[2]), inputs[2].name, *steps), inputs[2].name)
            op.Add(call.outputs[0], shift)
            op.nodes[-1].outputs[0] = output
            nodes += op.nodes
        self.replaced[id(node)] = nodes
        return nodes[-1]

    def _untied(self, product: Product) -> Product:
        """Give the classifier a weight of its own."""
        node, index = product.node, 1
        while node.inputs[index] is not product.constant:
            node, index = node.inputs[index].inputs[0], 0
        own = constant(self.model.fresh_name(f"{product.name}_untied"), weight_of(product.constant))
        node.inputs[index] = own
        if self.context.statistics is not None:
            self.context.statistics = self.context.statistics.changed(own.name, origin=product.name)
        return Product(product.node, own, product.k_axis)

    def _multiply_before(self, product: Product, norm: gs.Node, weight: Array, dtype: Any) -> None:
        """Undo the rotation before a classifier that stays as it is: x = x' R^T diag(weight)."""
        tensor = norm.outputs[0]
        op = Builder(self.model, f"{product.node.name or tensor.name}/unrotated")
        matrix = op.constant((self.rotation.matrix.T * weight).astype(dtype), f"{product.name}_unrotation")
        product.node.inputs[0] = op.MatMul(tensor, matrix)
        product.node.inputs[0].dtype = tensor.dtype
        if self.context.statistics is not None:
            steps = (Scaled(1 / weight), Rotated(self.rotation, self.stream.size))
            self.context.statistics = self.context.statistics.changed(matrix.name, *steps, origin=product.name)
        self._put_before(product.node, op.nodes)

    def _multiply_lookup(self, node: gs.Node) -> None:
        """Rotate what is looked up in a table that stays as it is."""
        looked_up = node.outputs[0]
        op = Builder(self.model, f"{node.name or looked_up.name}/rotated")
        centred = np.eye(self.stream.size) - (1 / self.stream.size if self.stream.centred else 0)
        matrix = self.rotation.apply(centred).astype(weight_of(node.inputs[0]).dtype)
        plain = gs.Variable(self.model.fresh_name(f"{looked_up.name}_plain"), looked_up.dtype, looked_up.shape)
        node.outputs[0] = plain
        op.MatMul(plain, op.constant(matrix, f"{node.inputs[0].name}_rotation"))
        op.nodes[-1].outputs[0] = looked_up
        graph = self.model.graph
        at = next(i for i, other in enumerate(graph.nodes) if other is node)
        graph.nodes[at + 1 : at + 1] = op.nodes

    def _put_before(self, node: gs.Node, fresh: list[gs.Node]) -> None:
        graph = self.model.graph
        at = next(i for i, other in enumerate(graph.nodes) if other is node)
        graph.nodes[at:at] = fresh


def _rotate_heads(model: Model, context: Context, change: Change) -> None:
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
        for product in site.products:
            product.change(Rotate(product.k_axis, rotation))
            if context.statistics is not None:
                context.statistics = context.statistics.changed(product.name, Rotated(rotation, product.rows))
        for maker in site.makers:
            constants.change(maker.node, maker.index, Rotate(maker.axis, rotation))
        change.sites.append(site.where)
