"""Where the queries, keys or values of an attention come from, head by head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.products.movement import columns_of_moves, moves_before
from onnxslim_llm.products.owned_weights import Constants, Product
from onnxslim_llm.rewrite.constants import constant_tensor, constant_value
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["HeadOperand", "HeadPath", "HeadRefusal", "check_common_products", "operand_of", "owned_product"]

_FLOAT_CASTS = (1, 10, 11, 16)
_BIAS = 2


class HeadRefusal(Exception):  # noqa: N818 (no failure: the search ends with a reason)
    """Why the heads of an attention must stay."""


@dataclass
class HeadPath:
    """What keeps every head where it is, between the tensor where heads have come together and the attention.

    Attributes:
        heads: H.
        width: D.
        vectors: (node, index of the input) of constants with an entry for each channel.
        rotaries: Rotary embeddings, which say H.
        reshapes: Reshapes around a norm within each head, whose constant shapes say H or H * D.
        tensors: The activations, from the attention on backwards.
    """

    heads: int
    width: int
    vectors: list[tuple[gs.Node, int]] = field(default_factory=list)
    rotaries: list[gs.Node] = field(default_factory=list)
    reshapes: list[gs.Node] = field(default_factory=list)
    tensors: list[gs.Variable] = field(default_factory=list)

    @property
    def size(self) -> int:
        """H * D."""
        return self.heads * self.width


@dataclass
class HeadOperand:
    """Queries, keys or values [B, S, H * D] of an attention.

    Attributes:
        path: What lies between `made` and the attention.
        made: The tensor [B, S, H * D] in which all channels have come together.
        product: The product that makes them, and perhaps more.
        columns: [H * D]: the column of the product that each channel is.
        biases: (node, index of the input) of vectors that are added before `made`, with an entry for each column.
        moves: Nodes between the product and `made`; none if `made` is the product's result.
        left: What the product multiplies, as [B, S, K].
    """

    path: HeadPath
    made: gs.Variable
    product: Product
    columns: NDArray[np.int64]
    biases: list[tuple[gs.Node, int]] = field(default_factory=list)
    moves: list[gs.Node] = field(default_factory=list)
    left: gs.Tensor | None = None


def operand_of(model: Model, constants: Constants, attention: gs.Node, index: int, heads: int) -> HeadOperand:
    """Return where an operand of an attention comes from.

    Args:
        model: The model, with inferred shapes.
        constants: Of the model.
        attention: With the tokens before the heads.
        index: 0 for queries, 1 for keys, 2 for values.
        heads: Number of heads of the operand.

    Raises:
        HeadRefusal: Its heads cannot be told apart.
    """
    tensor, reader = attention.inputs[index], attention
    shape = tensor.shape
    size = shape[-1] if shape is not None and len(shape) == 3 else None
    if not isinstance(size, int) or size % heads:
        raise HeadRefusal(f"the size of '{tensor.name}' is unknown")
    path = HeadPath(heads, size // heads)
    while True:
        _check_alone(constants, tensor, reader)
        path.tensors.append(tensor)
        before = _step_back(constants, tensor.inputs[0], path)
        if before is None:
            return _find_product(model, constants, path, tensor)
        tensor, reader = before


def check_common_products(constants: Constants, operands: Iterable[HeadOperand]) -> None:
    """Check that products which make several operands make nothing else.

    Raises:
        HeadRefusal: Something else reads them.
    """
    operands = list(operands)
    inside = {id(node) for operand in operands for node in operand.moves}
    ends = {id(operand.made) for operand in operands}
    for operand in operands:
        for node in (operand.product.node, *operand.moves) if operand.moves else ():
            for tensor in node.outputs:
                if id(tensor) in constants.outputs:
                    raise HeadRefusal(f"'{tensor.name}' is an output of the model")
                other = next((n for n in tensor.outputs if id(n) not in inside and id(tensor) not in ends), None)
                if other is not None:
                    raise HeadRefusal(f"{_named(other)} reads '{tensor.name}'")


def owned_product(constants: Constants, node: gs.Node | None, made: gs.Tensor) -> Product:
    """Return the product that `node` is.

    Args:
        constants: Of the model.
        node: A node that makes or reads an operand.
        made: The operand, for messages.

    Raises:
        HeadRefusal: It is none, or its weight cannot be changed.
    """
    if node is None:
        raise HeadRefusal(f"nothing in the model makes '{made.name}'")
    product = constants.product(node)
    if isinstance(product, Product):
        return product
    weight = node.inputs[1].inputs[0] if len(node.inputs) > 1 and node.inputs[1].inputs else None
    if weight is not None and weight.op == "DequantizeLinear":
        raise HeadRefusal(f"'{weight.inputs[0].name}' is quantized already")
    raise HeadRefusal(product or f"{_named(node)} is no product with a weight that could be changed")


def _check_alone(constants: Constants, tensor: gs.Tensor, reader: gs.Node) -> None:
    if not isinstance(tensor, gs.Variable) or not tensor.inputs:
        raise HeadRefusal(f"nothing in the model makes '{tensor.name}'")
    if id(tensor) in constants.outputs:
        raise HeadRefusal(f"'{tensor.name}' is an output of the model")
    other = next((node for node in tensor.outputs if node is not reader), None)
    if other is not None:
        raise HeadRefusal(f"{_named(other)} reads '{tensor.name}', too")


def _step_back(constants: Constants, node: gs.Node, path: HeadPath) -> tuple[gs.Tensor, gs.Node] | None:
    """Take in a node that leaves every head where it is; return what it reads, and what reads that."""
    plain = normal_domain(node.domain) == ""
    if any(concept.is_call(node) for concept in ROTARY.values()):
        path.rotaries.append(node)
        return node.inputs[0], node
    if plain and (node.op == "Identity" or (node.op == "Cast" and node.attrs["to"] in _FLOAT_CASTS)):
        return node.inputs[0], node
    if plain and node.op == "Clip" and all(t.is_empty() or constant_tensor(t) is not None for t in node.inputs[1:]):
        return node.inputs[0], node
    if plain and node.op in ("Add", "Mul", "Div"):
        for index, operand in enumerate(node.inputs):
            value = constant_tensor(operand)
            if value is None or (node.op == "Div" and index == 0):
                continue
            if weight_of(value).size == 1:
                return node.inputs[1 - index], node
            if constants.is_vector(operand, path.size):
                path.vectors.append((node, index))
                return node.inputs[1 - index], node
    if plain and node.op == "Reshape":
        return _head_norm(constants, node, path)
    return None


def _head_norm(constants: Constants, node: gs.Node, path: HeadPath) -> tuple[gs.Tensor, gs.Node] | None:
    """Take in a norm within each head, between two Reshapes."""
    norm = _producer(node.inputs[0])
    if norm is None or not _is_norm_of_heads(norm):
        return None
    first = _producer(norm.inputs[0])
    shape = norm.inputs[0].shape
    if first is None or first.op != "Reshape" or shape is None or list(shape[2:]) != [path.heads, path.width]:
        return None
    if any(constant_value(reshape.inputs[1]) is None for reshape in (first, node)):
        raise HeadRefusal(f"the shape of {_named(node)} is computed")
    _check_alone(constants, node.inputs[0], node)
    _check_alone(constants, norm.inputs[0], norm)
    path.reshapes += [node, first]
    path.tensors += [node.inputs[0], norm.inputs[0]]
    return first.inputs[0], first


def _is_norm_of_heads(node: gs.Node) -> bool:
    if RMS_NORM.is_call(node):
        return True
    plain = normal_domain(node.domain) == "" and node.op == "LayerNormalization"
    return plain and node.attrs.get("axis", -1) in (-1, 3)


def _find_product(model: Model, constants: Constants, path: HeadPath, made: gs.Variable) -> HeadOperand:
    moves = moves_before(made)
    tensor, nodes = moves.source, [node for node, _ in moves.steps]
    biases: list[tuple[gs.Node, int]] = []
    while nodes and (node := _producer(tensor)) is not None:
        index = next((i for i, t in enumerate(node.inputs) if constant_tensor(t) is not None), None)
        if node.op != "Add" or normal_domain(node.domain) != "" or index is None:
            break
        biases.append((node, index))
        nodes.append(node)
        tensor = node.inputs[1 - index]
    product = owned_product(constants, _producer(tensor), made)
    inputs = product.node.inputs
    if product.node.op == "Gemm" and len(inputs) > _BIAS and not inputs[_BIAS].is_empty():
        biases.append((product.node, _BIAS))
    for reader, index in biases:
        if not constants.is_vector(reader.inputs[index], product.columns):
            raise HeadRefusal(f"the bias of {_named(reader)} is no vector of {product.columns} elements")
    columns = columns_of_moves(moves, product.columns, model.opset() or 0)
    if columns is None or len(columns) != path.size:
        raise HeadRefusal(f"what lies between '{product.name}' and '{made.name}' does more than move its columns")
    if len(np.unique(columns)) != path.size:
        raise HeadRefusal(f"several of its heads read the same columns of '{product.name}'")
    left = _tokens_of(product) if nodes else None
    if nodes and left is None:
        raise HeadRefusal(f"what {_named(product.node)} multiplies has no axis of tokens")
    return HeadOperand(path, made, product, columns, biases, nodes, left)


def _tokens_of(product: Product) -> gs.Tensor | None:
    """Return the left operand of a product as [B, S, K], also where it is a Gemm of [B * S, K]."""
    if any(product.node.attrs.get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    tensor = product.node.inputs[0]
    if tensor.shape is not None and len(tensor.shape) == 2 and (node := _producer(tensor)) is not None:
        tensor = node.inputs[0] if node.op == "Reshape" else tensor
    shape = tensor.shape
    return tensor if shape is not None and len(shape) == 3 and shape[-1] == product.rows else None


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None


def _named(node: gs.Node) -> str:
    return f"{node.op} '{node.name or node.outputs[0].name}'"
