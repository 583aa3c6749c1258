"""Products that write to a residual stream."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxslim_llm.products.owned_weights import Constants, Product
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["writer_of"]


def writer_of(constants: Constants, tensor: gs.Variable) -> Product | str:
    """Return the last product whose result is added up into `tensor`, or why there is none that may be changed.

    Of several that are added at the same place the one with most rows is taken: it has most to say.
    """
    front: list[gs.Tensor] = [tensor]
    reason = "no product writes right before it"
    while front:
        found: list[Product] = []
        further: list[gs.Tensor] = []
        for node in (t.inputs[0] for t in front if isinstance(t, gs.Variable) and t.inputs):
            product = constants.product(node)
            if isinstance(product, Product):
                found.append(product)
            elif product:
                reason = product
            elif normal_domain(node.domain) == "" and node.op == "Add":
                further += [t for t in node.inputs if constant_tensor(t) is None]
            elif normal_domain(node.domain) == "" and (node.op == "Identity" or _keeps_channels(node)):
                further.append(node.inputs[0])
        if found:
            return max(found, key=lambda product: product.rows)
        front = further
    return reason


def _keeps_channels(node: gs.Node) -> bool:
    shapes = [tensor.shape for tensor in (node.inputs[0], node.outputs[0])] if node.op == "Reshape" else []
    return (
        len(shapes) == 2
        and all(shape and isinstance(shape[-1], int) for shape in shapes)
        and (shapes[0][-1] == shapes[1][-1])
    )
