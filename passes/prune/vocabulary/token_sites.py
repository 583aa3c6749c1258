"""Where a graph has its vocabulary: the table that token ids look up, and the product that makes the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.roles import constant_roles
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.products.owned_weights import Constants
from onnxslim_llm.products.reads import k_axis_of, product_reason, read_weight
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["LogitSite", "TokenTable", "find_logits", "find_table"]

_CARRIERS = ("Identity", "Cast")
_INTEGERS = ("int64", "int32")
#: Between the product and the logits: each logit stays in its place.
_LIGHT = ("Identity", "Cast", "Tanh", "Add", "Sub", "Mul", "Div")
_GEMM_BIAS = 2


@dataclass
class TokenTable:
    """An embedding table [V, D] that token ids look up.

    Attributes:
        constant: The table.
        lookups: The Gather nodes.
        source: Name of the model's input that holds the ids.
    """

    constant: gs.Constant
    lookups: list[gs.Node]
    source: str

    @property
    def size(self) -> int:
        """V."""
        return int(weight_of(self.constant).shape[0])


@dataclass
class LogitSite:
    """A product that makes the logits of all tokens.

    Attributes:
        node: The product.
        constant: Its weight.
        axis: The weight's axis of tokens.
        output: The logits, an output of the model.
        vectors: What is added to or multiplied with them on the way: the reader, and which of its inputs.
        tensors: The results [..., V] on the way, `output` among them.
    """

    node: gs.Node
    constant: gs.Constant
    axis: int
    output: gs.Variable
    vectors: list[tuple[gs.Node, int]] = field(default_factory=list)
    tensors: list[gs.Variable] = field(default_factory=list)


def find_table(model: Model) -> TokenTable | str:
    """Return the largest table that ids from an input of the model look up, or why there is none."""
    inputs = {id(tensor) for tensor in model.graph.inputs}
    roles = {id(constant): role for constant, role in constant_roles(model)}
    found: dict[int, TokenTable] = {}
    for node in model.graph.nodes:
        if normal_domain(node.domain) != "" or node.op != "Gather" or node.attrs.get("axis", 0) not in (0, -2):
            continue
        table = node.inputs[0]
        ids = node.inputs[1]
        while isinstance(ids, gs.Variable) and ids.inputs and ids.inputs[0].op in _CARRIERS:
            ids = ids.inputs[0].inputs[0]
        if not isinstance(table, gs.Constant) or len(weight_of(table).shape) != 2 or id(ids) not in inputs:
            continue
        if roles.get(id(table)) == "embedding" and str(node.inputs[1].dtype) in _INTEGERS:
            found.setdefault(id(table), TokenTable(table, [], ids.name)).lookups.append(node)
    if not found:
        return "no float table is looked up with ids from an input of the model"
    return max(found.values(), key=lambda table: table.size)


def find_logits(model: Model, constants: Constants, size: int) -> LogitSite | str:
    """Return where logits of `size` tokens are made, "" if nowhere, or why that cannot be changed."""
    for node in model.graph.nodes:
        if normal_domain(node.domain) != "" or node.op not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        read = read_weight(node.inputs[1])
        if read is None or len(weight_of(read.constant).shape) != 2:
            continue
        axis = 1 - k_axis_of(node, read.transposed)
        if weight_of(read.constant).shape[axis] != size:
            continue
        reason = product_reason(node, weight_of(read.constant))
        if read.in_node:
            reason = "its weight lies in a Constant node: clean the model up first"
        if reason:
            return reason
        site = LogitSite(node, read.constant, axis, node.outputs[0])
        obstacle = _follow(site, constants, size)
        if obstacle is not None:
            return obstacle or site
    return ""


def _follow(site: LogitSite, constants: Constants, size: int) -> str | None:
    """Fill a site; return "" if it ends in an output of the model, why it cannot be cut, or None if it is none."""
    if site.node.op == "Gemm" and len(site.node.inputs) > _GEMM_BIAS and not site.node.inputs[_GEMM_BIAS].is_empty():
        if not constants.is_vector(site.node.inputs[_GEMM_BIAS], size):
            return "its bias is no vector of tokens"
        site.vectors.append((site.node, _GEMM_BIAS))
    while True:
        site.tensors.append(site.output)
        if id(site.output) in constants.outputs:
            return "" if not site.output.outputs else "the logits are read in the graph, too"
        if len(site.output.outputs) != 1:
            return None
        node = site.output.outputs[0]
        if normal_domain(node.domain) != "" or node.op not in _LIGHT:
            return None
        for index, tensor in enumerate(node.inputs):
            if tensor is site.output:
                continue
            other = constant_tensor(tensor)
            if other is None:
                return None
            if weight_of(other).size != 1:
                if not constants.is_vector(tensor, size):
                    return f"{node.op} '{node.name or node.outputs[0].name}' changes the logits by more than a vector"
                site.vectors.append((node, index))
        site.output = node.outputs[0]


def other_reader(constant: gs.Constant, accepted: Callable[[gs.Node], bool]) -> str:
    """Return what reads a constant but accepted nodes, through Transpose, Cast and Identity; "" if nothing does."""
    for node in constant.outputs:
        if accepted(node):
            continue
        if normal_domain(node.domain) == "" and node.op in ("Transpose", "Cast", "Identity"):
            for reader in node.outputs[0].outputs:
                if not accepted(reader):
                    return f"{reader.op} '{reader.name or reader.outputs[0].name}'"
            continue
        return f"{node.op} '{node.name or node.outputs[0].name}'"
    return ""
