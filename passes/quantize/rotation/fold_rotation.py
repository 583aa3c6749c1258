"""A rotation of the residual stream, folded into the constants around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.concepts.concept import replace_nodes
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.ir.weights import constant, weight_of
from onnxslim_llm.passes.quantize.rotation.residual_stream import NormRead, ResidualStream
from onnxslim_llm.passes.quantize.rotation.rotate_step import Rotate
from onnxslim_llm.passes.quantize.rotation.rotation import Rotated, Rotation
from onnxslim_llm.products.owned_weights import Constants, Product
from onnxslim_llm.products.transform_job import Centre, Scale, Step, transformed
from onnxslim_llm.rewrite.edit import Builder, detach
from onnxslim_llm.stats.transforms import Scaled

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["RotationFold"]

Array = NDArray[Any]


class RotationFold:
    """Folds one rotation into everything around a residual stream.

    Args:
        model: The model that the stream was found in.
        context: Its statistics are changed to what they will be.
        stream: What touches the stream.
        rotation: Of its size.
        tied: What becomes of a classifier that shares its weight with the embedding: "" (there is none), "rotate"
            (both), "multiply" (by the rotation behind the look-up, and back before the classifier) or "untie".

    Attributes:
        added: The matrices that "multiply" adds.
    """

    def __init__(self, model: Model, context: Context, stream: ResidualStream, rotation: Rotation, tied: str) -> None:
        self.model, self.context, self.stream, self.rotation, self.tied = model, context, stream, rotation, tied
        self.constants = Constants(model)
        self.replaced: dict[int, list[gs.Node]] = {}
        self.removed: list[gs.Node] = []  # keeps them alive, so that their ids stay theirs
        self.ones: dict[str, gs.Constant] = {}
        self.added: list[gs.Constant] = []

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
        self.added.append(matrix)
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
        self.added.append(op.constant(matrix, f"{node.inputs[0].name}_rotation"))
        op.MatMul(plain, self.added[-1])
        op.nodes[-1].outputs[0] = looked_up
        graph = self.model.graph
        at = next(i for i, other in enumerate(graph.nodes) if other is node)
        graph.nodes[at + 1 : at + 1] = op.nodes

    def _put_before(self, node: gs.Node, fresh: list[gs.Node]) -> None:
        graph = self.model.graph
        at = next(i for i, other in enumerate(graph.nodes) if other is node)
        graph.nodes[at:at] = fresh
