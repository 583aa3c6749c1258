"""The heads of attentions: which products make their queries, keys and values, which one sums them, where caches are.

A key head with its query heads can be left out: its columns in the products before, its rows in the product behind, its
place in the caches. Told from the flow of data; names are never read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.concepts.attention import attention_form, is_attention
from onnxslim_llm.products.caches import Cache, caches_of
from onnxslim_llm.products.head_operands import (
    HeadOperand,
    HeadRefusal,
    check_common_products,
    operand_of,
    owned_product,
)
from onnxslim_llm.products.owned_weights import Constants, Product
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.passes import Change

__all__ = ["HeadLayer", "find_head_layers"]

#: Operators of runtimes that are whole attentions already.
_WHOLE = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention", "SparseAttention"})
_HEAD_AXIS = -3  # of the additive mask [B, H, S, T]


@dataclass
class HeadLayer:
    """An attention whose heads can be left out.

    Attributes:
        node: The attention.
        queries, keys, values: Its operands.
        product: What sums the result of all heads.
        flatten: The Reshape to [B * S, H * D] before it, if there is one.
        mask: The index of the additive mask among the inputs, if that has an entry for each query head.
        caches: Those of keys and values; none without a cache.
    """

    node: gs.Node
    queries: HeadOperand
    keys: HeadOperand
    values: HeadOperand
    product: Product
    flatten: gs.Node | None = None
    mask: int | None = None
    caches: list[Cache] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the attention."""
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def groups(self) -> int:
        """Number of key heads: each goes or stays with its query heads."""
        return self.keys.path.heads

    @property
    def group_size(self) -> int:
        """Query heads of a key head."""
        return self.queries.path.heads // self.groups

    def rows(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of the summing product that belong to some key heads."""
        size = self.group_size * self.values.path.width
        return (groups[:, None] * size + np.arange(size)).reshape(-1)

    def heads(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the query heads of some key heads."""
        return (groups[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)


def find_head_layers(model: Model, change: Change) -> list[HeadLayer]:
    """Return the attentions of the top graph whose heads can go, in order.

    Args:
        model: The model, with inferred shapes.
        change: Told of the attentions that are left alone, and why.
    """
    constants = Constants(model)
    found: list[HeadLayer] = []
    for node in model.graph.nodes:
        if is_attention(node):
            try:
                found.append(_layer(model, constants, node))
            except HeadRefusal as refusal:
                change.skip(str(node.name or node.outputs[0].name), str(refusal))
        elif node.op in _WHOLE:
            reason = f"it is the operator {node.op} already: start from an export in primitive operators"
            change.skip(str(node.name or node.outputs[0].name), reason)
    if not found and not change.skipped:
        change.skip("the model", "no attention is fused: put the passes of the recipe 'safe' before this one")
    return found


def _layer(model: Model, constants: Constants, node: gs.Node) -> HeadLayer:
    form = attention_form(node)
    if form.heads_major:
        raise HeadRefusal("it has the heads before the tokens")
    queries, keys = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
    if queries % keys:
        raise HeadRefusal(f"{queries} query heads cannot be shared out among {keys} key heads")
    if node.inputs[1] is node.inputs[2]:
        raise HeadRefusal("its values are its keys, too")
    q, k, v = (operand_of(model, constants, node, i, heads) for i, heads in enumerate((queries, keys, keys)))
    check_common_products(constants, (q, k, v))
    product, flatten = _sum(constants, node.outputs[0])
    if product.rows != queries * v.path.width:
        raise HeadRefusal(f"'{product.name}' sums {product.rows} channels, not {queries} heads of {v.path.width}")
    layer = HeadLayer(node, q, k, v, product, flatten)
    if form.bias:
        layer.mask = _mask(node, form.inputs.index("bias"), queries)
    caches = caches_of(model, node)
    if isinstance(caches, str):
        raise HeadRefusal(caches)
    layer.caches = caches
    return layer


def _sum(constants: Constants, tensor: gs.Variable) -> tuple[Product, gs.Node | None]:
    """Return the product that sums the heads, and the Reshape before it."""
    if len(tensor.outputs) != 1 or id(tensor) in constants.outputs:
        raise HeadRefusal(f"'{tensor.name}' is read by more than one product")
    node, flatten = tensor.outputs[0], None
    if node.op == "Reshape" and normal_domain(node.domain) == "":
        shape, (result,) = constant_value(node.inputs[1]), node.outputs
        if shape is None or shape.size != 2 or len(result.outputs) != 1 or id(result) in constants.outputs:
            raise HeadRefusal(f"Reshape '{node.name or result.name}' stands before the product that sums it")
        flatten, tensor, node = node, result, result.outputs[0]
    product = owned_product(constants, node, tensor)
    if product.node.inputs[0] is not tensor:
        raise HeadRefusal(f"'{product.name}' is no right operand")
    return product, flatten


def _mask(node: gs.Node, index: int, heads: int) -> int | None:
    """Return the index of the mask if it has a head axis that is not 1."""
    name, shape = node.inputs[index].name, node.inputs[index].shape
    if shape is None:
        raise HeadRefusal(f"the shape of its mask '{name}' is unknown")
    if len(shape) < -_HEAD_AXIS or shape[_HEAD_AXIS] == 1:
        return None
    if shape[_HEAD_AXIS] != heads:
        raise HeadRefusal(f"the heads of its mask '{name}' are unknown")
    return index
