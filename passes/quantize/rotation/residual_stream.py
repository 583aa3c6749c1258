"""The residual stream of a transformer: what writes to it, what reads it, or why its channels cannot be mixed.

It starts where tokens are looked up, and reaches over additions to every product that writes to it and every norm that
reads it. Told from the flow of data; names are never read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.roles import constant_roles
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.quantize.folding.fold_sites import norm_vectors
from onnxslim_llm.products.owned_weights import Constants, Product
from onnxslim_llm.products.reads import k_axis_of, read_weight
from onnxslim_llm.rewrite.constants import constant_tensor, constant_value
from onnxslim_llm.rewrite.facts import rank_of
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["NormRead", "ResidualStream", "Stuck", "find_residual_stream", "is_uniform"]

_WATCHERS = frozenset({"Shape", "Size"})
_FLOAT_CASTS = (1, 10, 11, 16)
_GEMM_BIAS = 2


class Stuck(Exception):  # noqa: N818 (no failure: the search ends with a reason)
    """Something that the channels of a residual stream cannot be mixed through.

    Args:
        where: Name of the node or tensor.
        reason: One sentence.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.where = where
        self.reason = reason


@dataclass
class NormRead:
    """A norm that reads the stream.

    Attributes:
        node: The norm.
        products: What reads the result, without a tied classifier.
        tied: The classifier that shares its weight with the embedding, if it reads the result.
    """

    node: gs.Node
    products: list[Product] = field(default_factory=list)
    tied: Product | None = None


@dataclass
class ResidualStream:
    """All that touches a residual stream [..., D].

    Attributes:
        size: D.
        lookups: Gathers of tables [V, D] that write to it.
        tables: Their tables, each once.
        writers: Products whose columns write to it.
        biases: (node, index of the input) of constant vectors that are added to it.
        norms: The norms that read it.
        direct: Products that read it without a norm.
    """

    size: int
    lookups: list[gs.Node] = field(default_factory=list)
    tables: list[gs.Constant] = field(default_factory=list)
    writers: list[Product] = field(default_factory=list)
    biases: list[tuple[gs.Node, int]] = field(default_factory=list)
    norms: list[NormRead] = field(default_factory=list)
    direct: list[Product] = field(default_factory=list)

    @property
    def centred(self) -> bool:
        """Whether its norms subtract the mean."""
        return any(read.node.op == "LayerNormalization" for read in self.norms)

    @property
    def tied(self) -> NormRead | None:
        """The norm before a classifier that shares its weight with an embedding."""
        return next((read for read in self.norms if read.tied is not None), None)


def find_residual_stream(model: Model) -> ResidualStream:
    """Return the residual stream of the top graph.

    Raises:
        Stuck: There is none, or its channels cannot be mixed.
    """
    roles = {id(constant): role for constant, role in constant_roles(model)}
    for node in model.graph.nodes:
        table = _table(node)
        if table is not None and roles.get(id(table)) == "embedding":
            return _Search(model, int(table.shape[1])).run(node.outputs[0])
    raise Stuck("the model", "no table of token embeddings is looked up")


def _table(node: gs.Node) -> gs.Constant | None:
    if normal_domain(node.domain) != "" or node.op != "Gather" or node.attrs.get("axis", 0) != 0:
        return None
    table = node.inputs[0]
    return table if isinstance(table, gs.Constant) and len(table.shape) == 2 else None


class _Search:
    def __init__(self, model: Model, size: int) -> None:
        self.constants = Constants(model)
        self.stream = ResidualStream(size)
        self._seen: dict[int, gs.Tensor] = {}
        self._readers: list[tuple[gs.Node, NormRead | None]] = []

    def run(self, start: gs.Tensor) -> ResidualStream:
        stack = [start]
        done: set[int] = set()
        while stack:
            tensor = stack.pop()
            if id(tensor) in self._seen:
                continue
            self._seen[id(tensor)] = tensor
            if id(tensor) in self.constants.outputs:
                raise Stuck(tensor.name, "the residual stream is an output of the model")
            if not tensor.inputs:
                raise Stuck(tensor.name, "the residual stream is an input of the model")
            producer = tensor.inputs[0]
            if id(producer) not in done:
                done.add(id(producer))
                stack += self._written_by(producer)
            for node in {id(n): n for n in tensor.outputs}.values():
                if id(node) not in done and self._is_reader(node, tensor):
                    done.add(id(node))
                elif id(node) not in done:
                    stack += node.outputs[:1]
        for node, norm in self._readers:
            self._read_by(node, norm)
        self._check_tables()
        self._check_norms()
        return self.stream

    def _written_by(self, node: gs.Node) -> list[gs.Tensor]:
        """Take note of what a node writes, and return the tensors of the stream that it reads."""
        table = _table(node)
        if table is not None:
            self.stream.lookups.append(node)
            if all(table is not known for known in self.stream.tables):
                self.stream.tables.append(table)
            return []
        found = self.constants.product(node)
        if isinstance(found, Product):
            self.stream.writers.append(found)
            if len(node.inputs) > _GEMM_BIAS and not node.inputs[_GEMM_BIAS].is_empty():
                self._bias(node, _GEMM_BIAS)
            return []
        if found:
            raise Stuck(_name(node), found)
        return self._passed_on(node)

    def _passed_on(self, node: gs.Node) -> list[gs.Tensor]:
        """Return the tensors of the stream that a node adds up, scales or hands on.

        Raises:
            Stuck: It does something else.
        """
        plain = normal_domain(node.domain) == ""
        if plain and node.op == "Add":
            for index, tensor in enumerate(node.inputs):
                if constant_tensor(tensor) is not None:
                    self._bias(node, index)
            return [tensor for tensor in node.inputs if constant_tensor(tensor) is None]
        if plain and node.op in ("Mul", "Div"):
            scalars = [i for i, t in enumerate(node.inputs) if (v := constant_value(t, 1)) is not None and v.size == 1]
            if scalars and (node.op == "Mul" or scalars == [1]):
                return [tensor for i, tensor in enumerate(node.inputs) if i != scalars[0]]
        if plain and (node.op in ("Identity", "Dropout") or (node.op == "Cast" and node.attrs["to"] in _FLOAT_CASTS)):
            return [node.inputs[0]]
        if plain and node.op in ("Slice", "Gather", "Reshape", "Squeeze", "Unsqueeze") and self._keeps_channels(node):
            return [node.inputs[0]]
        if norm_vectors(node) is not None:
            raise Stuck(_name(node), "the result of a norm goes into the residual stream: its weight cannot be moved")
        raise Stuck(_name(node), f"{node.op} writes to the residual stream")

    def _keeps_channels(self, node: gs.Node) -> bool:
        """Return whether a node takes, adds or removes tokens or axes only."""
        data, result = node.inputs[0], node.outputs[0]
        rank = rank_of(data)
        if node.op == "Gather":
            axis = int(node.attrs.get("axis", 0))
            return rank is not None and axis % rank != rank - 1
        if node.op == "Slice":
            axes = constant_value(node.inputs[3]) if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None
            return rank is not None and axes is not None and bool((axes % rank != rank - 1).all())
        sizes = [t.shape[-1] if t.shape else None for t in (data, result)]
        return all(size == self.stream.size for size in sizes)

    def _bias(self, node: gs.Node, index: int) -> None:
        if not self.constants.is_vector(node.inputs[index], self.stream.size):
            raise Stuck(_name(node), f"a constant is added to the residual stream that is no [{self.stream.size}]")
        self.stream.biases.append((node, index))

    def _is_reader(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        """Take note of a node that ends the stream; False for one that goes on with it."""
        if node.op in _WATCHERS:
            return True
        if norm_vectors(node) is not None and node.inputs[0] is tensor:
            norm = NormRead(node)
            self.stream.norms.append(norm)
            self._norm_result(node, norm)
            return True
        if normal_domain(node.domain) == "" and node.op in ("MatMul", "Gemm") and node.inputs[0] is tensor:
            self._readers.append((node, None))
            return True
        if node.op == "Add" and normal_domain(node.domain) == "":
            return False
        self._passed_on(node)  # refuses what the stream cannot go through
        return False

    def _norm_result(self, node: gs.Node, norm: NormRead) -> None:
        for index in norm_vectors(node) or ():
            if not self.constants.is_vector(node.inputs[index], self.stream.size):
                raise Stuck(_name(node), "the weight of a norm is no constant vector")
        result = node.outputs[0]
        if id(result) in self.constants.outputs:
            raise Stuck(result.name, "the result of a norm is an output of the model")
        for reader in {id(n): n for n in result.outputs}.values():
            if reader.op in _WATCHERS:
                continue
            if normal_domain(reader.domain) != "" or reader.op not in ("MatMul", "Gemm"):
                raise Stuck(_name(reader), f"{reader.op} reads the result of a norm, not only products do")
            self._readers.append((reader, norm))

    def _read_by(self, node: gs.Node, norm: NormRead | None) -> None:
        read = read_weight(node.inputs[1])
        if read is None:
            raise Stuck(_name(node), f"{node.op} with no weight reads the residual stream")
        if norm is not None and any(read.constant is table for table in self.stream.tables):
            norm.tied = Product(node, read.constant, k_axis_of(node, read.transposed))
            return
        found = self.constants.product(node)
        if not isinstance(found, Product):
            raise Stuck(_name(node), found or f"{node.op} with no weight reads the residual stream")
        (self.stream.direct if norm is None else norm.products).append(found)

    def _check_tables(self) -> None:
        tied = self.stream.tied
        allowed = {id(node) for node in self.stream.lookups}
        for table in self.stream.tables:
            reason = self.constants.matrix_reason(table)
            if reason:
                raise Stuck(table.name, reason)
            for node in table.outputs:
                carries = tied is not None and tied.tied is not None and _leads_to(node, tied.tied.node)
                if id(node) not in allowed and not carries:
                    raise Stuck(table.name, f"{node.op} reads the embedding, too")

    def _check_norms(self) -> None:
        if not self.stream.norms:
            raise Stuck("the model", "no norm reads the residual stream")
        kinds = {read.node.op for read in self.stream.norms}
        if len(kinds) > 1:
            raise Stuck(_name(self.stream.norms[0].node), "some norms subtract the mean and others do not")
        if self.stream.centred and self.stream.direct:
            raise Stuck(_name(self.stream.direct[0].node), "a product reads the residual stream with its mean")
        for read in self.stream.norms:
            if (weight_of(read.node.inputs[1]).load() == 0).any():
                raise Stuck(_name(read.node), "the weight of a norm has zeros: nothing is known of what they hide")
            if not read.products and read.tied is None:
                raise Stuck(_name(read.node), "no product reads the result of a norm")


def _leads_to(node: gs.Node, product: gs.Node) -> bool:
    while node is not product:
        if node.op not in ("Transpose", "Cast", "Identity") or len(node.outputs[0].outputs) != 1:
            return False
        node = node.outputs[0].outputs[0]
    return True


def _name(node: gs.Node) -> str:
    return str(node.name or node.outputs[0].name)


def is_uniform(vector: np.ndarray) -> bool:
    """Return whether all elements are the same."""
    return bool((vector == vector.flat[0]).all())
