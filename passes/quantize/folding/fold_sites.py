"""Where the input of products can be scaled by channel without a new node: what makes it takes the inverse factor.

With y = x W and any s > 0, y = (x / s)(diag(s) W). The division goes into what makes x: the weight (and bias) of a
norm, the columns of a product whose result reaches x without anything that is not linear in it, or the columns that
make the values of an attention. Told from the flow of data; names are never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.concepts.attention import attention_form, is_attention
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.products.owned_weights import Constants, Product
from onnxslim_llm.products.reads import read_weight
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.facts import rank_of
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.passes import Change

__all__ = ["FoldSite", "Maker", "find_fold_sites", "norm_vectors"]

Array = NDArray[Any]
Kind = Literal["norm", "product", "values"]

_WATCHERS = frozenset({"Shape", "Size"})
_BIAS = 2


@dataclass(frozen=True)
class Maker:
    """A constant of what makes the input: one entry along `axis` for each channel.

    Attributes:
        node: What reads the constant as its input number `index`.
        axis: Of the stored constant.
    """

    node: gs.Node
    index: int
    axis: int


@dataclass(frozen=True)
class FoldSite:
    """Products with a common input, and where the inverse of its factors goes.

    Attributes:
        where: Name of the input x[..., K].
        kind: What makes it.
        products: All that read it.
        makers: The constants that are divided by the factors.
        channels: [K]: which of the maker's channels each channel of x comes from; several query heads share the values
            of one key head.
        mixable: Whether channels of one head of values could be mixed as well as scaled.
        cache: The output of the attention that hands the values on, if there is one.
    """

    where: str
    kind: Kind
    products: tuple[Product, ...]
    makers: tuple[Maker, ...]
    channels: Array
    mixable: bool = False
    cache: str = ""


def find_fold_sites(model: Model, change: Change) -> list[FoldSite]:
    """Return the sites of the top graph, in order; `change` is told which inputs cannot be scaled, and why."""
    constants = Constants(model)
    groups: dict[int, tuple[gs.Tensor, list[Product], list[str]]] = {}
    for node in model.graph.nodes:
        found = constants.product(node)
        if found == "":
            continue
        _, products, reasons = groups.setdefault(id(node.inputs[0]), (node.inputs[0], [], []))
        if isinstance(found, Product):
            products.append(found)
        else:
            reasons.append(found)
    sites = []
    for tensor, products, reasons in groups.values():
        site = _site(constants, tensor, products, reasons)
        if isinstance(site, FoldSite):
            sites.append(site)
        else:
            change.skip(tensor.name, site)
    return sites


def _site(constants: Constants, tensor: gs.Tensor, products: list[Product], reasons: list[str]) -> FoldSite | str:
    if reasons:
        return reasons[0]
    if id(tensor) in constants.outputs:
        return "it is an output of the model"
    readers = {id(product.node) for product in products}
    for node in tensor.outputs:
        if id(node) not in readers and node.op not in _WATCHERS:
            return f"{node.op} '{node.name or node.outputs[0].name}' reads it, too"
    size = products[0].rows
    if not isinstance(tensor, gs.Variable) or not tensor.inputs:
        return "nothing in the model makes it"
    node = tensor.inputs[0]
    identity = np.arange(size)
    if norm_vectors(node) is not None:
        makers = _of_norm(constants, node, size)
        return makers if isinstance(makers, str) else FoldSite(tensor.name, "norm", tuple(products), makers, identity)
    if is_attention(node):
        return _of_values(constants, node, tensor, tuple(products))
    found = _of_product(constants, tensor, size)
    return found if isinstance(found, str) else FoldSite(tensor.name, "product", tuple(products), found, identity)


def norm_vectors(node: gs.Node) -> tuple[int, ...] | None:
    """Return which inputs of a norm over the last axis are its weight and bias; None if it is no norm."""
    if RMS_NORM.is_call(node):
        return (1,)
    if normal_domain(node.domain) != "" or node.op != "LayerNormalization":
        return None
    axis, rank = node.attrs.get("axis", -1), rank_of(node.inputs[0])
    if axis != -1 and (rank is None or axis != rank - 1):
        return None
    return (1, 2) if len(node.inputs) > _BIAS and not node.inputs[2].is_empty() else (1,)


def _of_norm(constants: Constants, node: gs.Node, size: int) -> tuple[Maker, ...] | str:
    indices = norm_vectors(node) or ()
    for index in indices:
        if not constants.is_vector(node.inputs[index], size):
            return f"the weight of the norm '{node.name or node.outputs[0].name}' is no vector of {size} elements"
    return tuple(Maker(node, index, len(node.inputs[index].shape) - 1) for index in indices)


def _of_values(constants: Constants, node: gs.Node, tensor: gs.Tensor, products: tuple[Product, ...]) -> FoldSite | str:
    if tensor is not node.outputs[0]:
        return "an attention makes it as its cache"
    if attention_form(node).heads_major:
        return "its attention has the heads before the tokens"
    if sum(t is node.inputs[2] for t in node.inputs) > 1:
        return "its values are its keys, too"
    queries, keys = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
    size = products[0].rows
    width = size // queries
    found = _of_product(constants, node.inputs[2], width * keys, node)
    if isinstance(found, str):
        return found
    channel = np.arange(size)
    channels = channel // width // (queries // keys) * width + channel % width
    cache = node.outputs[2].name if len(node.outputs) > _BIAS else ""
    mixable = all(maker.node.op in ("MatMul", "Gemm", "Add") for maker in found)
    return FoldSite(tensor.name, "values", products, found, channels, mixable, cache)


def _of_product(
    constants: Constants, tensor: gs.Tensor, size: int, reader: gs.Node | None = None
) -> tuple[Maker, ...] | str:
    """Return the constants behind a tensor that is linear in the result of a product."""
    makers: list[Maker] = []
    for node, index in _steps_back(constants, tensor, reader):
        if node is None:
            return "what makes it cannot take a factor by channel"
        if index < 0:  # the product itself
            found = constants.product(node)
            if not isinstance(found, Product):
                return found or f"{node.op} '{node.name or node.outputs[0].name}' makes it"
            if found.columns != size:
                return f"the product before it has {found.columns} columns, not {size}"
            makers.append(Maker(node, 1, 1 - found.k_axis))
        elif not constants.is_vector(node.inputs[index], size):
            return f"the bias of '{node.name or node.outputs[0].name}' is no vector of {size} elements"
        else:
            makers.append(Maker(node, index, len(node.inputs[index].shape) - 1))
    return tuple(makers)


def _steps_back(
    constants: Constants, tensor: gs.Tensor, reader: gs.Node | None
) -> Iterator[tuple[gs.Node | None, int]]:
    """Yield (node, index of a bias) on the way back to the product, and (product, -1) at its end; (None, 0) for none.

    `reader`, if given, must be all that reads the tensor.
    """
    first = reader is None
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        users = [n for n in tensor.outputs if n.op not in _WATCHERS]
        if not first and (len({id(n) for n in users}) != 1 or id(tensor) in constants.outputs):
            break
        first = False
        node = tensor.inputs[0]
        plain = normal_domain(node.domain) == ""
        if plain and node.op in ("MatMul", "Gemm"):
            if node.op == "Gemm" and len(node.inputs) > _BIAS and not node.inputs[_BIAS].is_empty():
                yield node, _BIAS
            yield node, -1
            return
        if plain and node.op == "Add":
            index = next((i for i, t in enumerate(node.inputs) if constant_tensor(t) is not None), None)
            if index is None:
                break
            yield node, index
            tensor = node.inputs[1 - index]
        elif plain and node.op in ("Identity", "Relu"):
            tensor = node.inputs[0]
        elif plain and node.op == "Mul" and node.inputs[0] is not node.inputs[1]:
            linear = [t for t in node.inputs if _is_linear(t)]
            if not linear:
                break
            tensor = linear[-1]
        else:
            break
    yield None, 0


def _is_linear(tensor: gs.Tensor) -> bool:
    """Return whether a factor of a gate comes right from a product, with a bias perhaps."""
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        node = tensor.inputs[0]
        if normal_domain(node.domain) != "":
            return False
        if node.op in ("MatMul", "Gemm"):
            return read_weight(node.inputs[1]) is not None
        if node.op != "Add":
            return False
        index = next((i for i, t in enumerate(node.inputs) if constant_tensor(t) is not None), None)
        if index is None:
            return False
        tensor = node.inputs[1 - index]
    return False
