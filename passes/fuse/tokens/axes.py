"""Which axis of a tensor runs over the tokens of the text, and whether an operator keeps tokens apart.

A model may be run piece by piece only if nothing but its attentions lets a token see others. That is what is shown
here, operator by operator: one that is not known to keep tokens apart is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH
from onnxslim_llm.concepts.attention import attention_form, is_attention
from onnxslim_llm.concepts.concept import DOMAIN
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim, product
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["ELEMENTWISE", "MixesTokensError", "TokenAxes", "TokenAxis"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Operators of ai.onnx whose outputs depend on the elements at the same place only, broadcasting aside.
ELEMENTWISE = _names(
    "Abs Add And BitShift Cast CastLike Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual "
    "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or Pow "
    "PRelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh Where Xor"
)
_CONCEPTS = frozenset(concept.name for concept in (GELU, GELU_TANH, SWISH))
_ALONG_AXIS = {"Softmax": -1, "LogSoftmax": -1, "LayerNormalization": -1, "RMSNormalization": -1, "TopK": -1}
_REDUCTIONS = _names("ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2 ReduceSumSquare ReduceProd")


class MixesTokensError(Exception):
    """A place where tokens are, or may be, mixed.

    Attributes:
        reason: Why.
        where: Name of the node.
    """

    def __init__(self, reason: str, node: gs.Node) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = node.name or (node.outputs[0].name if node.outputs else node.op)


@dataclass(frozen=True)
class TokenAxis:
    """Axis `axis` of `rank` runs over tokens; `flat`: over those of all texts of the batch, one text after another."""

    axis: int
    rank: int
    flat: bool = False

    @property
    def from_right(self) -> int:
        """The axis counted from the last one: 1 is the last."""
        return self.rank - self.axis


class TokenAxes:
    """The token axes of all tensors that depend on the text.

    Args:
        graph: Its nodes are in order.
        values: Shapes of its tensors.
        roots: Inputs [batch, tokens] that hold something for each token.
        batch, length: Their sizes.

    Raises:
        MixesTokensError: An operator mixes tokens, or is not known not to.
    """

    def __init__(
        self, graph: gs.Graph, values: SymbolicValues, roots: list[gs.Tensor], batch: Dim, length: Dim
    ) -> None:
        self._values = values
        self._batch, self._length = batch, length
        self._known: dict[int, TokenAxis] = {id(root): TokenAxis(1, 2) for root in roots}
        for node in graph.nodes:
            if next(iter(node.subgraphs()), None) is not None:
                raise MixesTokensError(f"{node.op} has a subgraph", node)
            if node.op in ("Shape", "Size") or not any(id(tensor) in self._known for tensor in node.inputs):
                continue
            axis = self._through(node)
            for tensor in node.outputs:
                self._known[id(tensor)] = axis

    def of(self, tensor: gs.Tensor) -> TokenAxis | None:
        """Return the token axis; None if the tensor does not depend on the text."""
        return self._known.get(id(tensor))

    def _through(self, node: gs.Node) -> TokenAxis:
        if node.domain == DOMAIN:
            return self._concept(node)
        if normal_domain(node.domain) != "":
            raise MixesTokensError(f"{node.domain}::{node.op} is not known to keep tokens apart", node)
        if node.op in ELEMENTWISE:
            return self._elementwise(node)
        if node.op in _ALONG_AXIS:
            return self._along(node, int(node.attrs.get("axis", _ALONG_AXIS[node.op])))
        if node.op in _REDUCTIONS:
            return self._reduce(node)
        rule: Callable[[gs.Node], TokenAxis] | None = getattr(self, f"_{node.op.lower()}", None)
        if rule is None:
            raise MixesTokensError(f"{node.op} is not known to keep tokens apart", node)
        return rule(node)

    def _first(self, node: gs.Node) -> TokenAxis:
        """Return the axis of the first input, if it is the only one that depends on the text."""
        first = self.of(node.inputs[0])
        if first is None or any(id(tensor) in self._known for tensor in node.inputs[1:]):
            raise MixesTokensError(f"{node.op} combines tensors of the text in a way that is not known", node)
        return first

    def _rank(self, tensor: gs.Tensor, node: gs.Node) -> int:
        known = self.of(tensor)
        if known is not None:
            return known.rank
        shape = self._values.shape_of(tensor)
        if shape is None:
            raise MixesTokensError(f"the rank of '{tensor.name}' is not known", node)
        return len(shape)

    def _concept(self, node: gs.Node) -> TokenAxis:
        if is_attention(node):
            heads_major = attention_form(node).heads_major
            wanted = TokenAxis(2, 4) if heads_major else TokenAxis(1, 3)
            for tensor in node.inputs[:3]:
                if self.of(tensor) != wanted:
                    raise MixesTokensError(f"'{tensor.name}' is not made from the same text: no self-attention", node)
            if any(self.of(tensor) is not None for tensor in node.inputs[3:]):
                raise MixesTokensError("its mask depends on the text itself, of which a cache keeps nothing", node)
            return wanted
        if node.op in {concept.name for concept in ROTARY.values()}:
            # The angles may come from position ids, which are given token by token like the text.
            if any(self.of(tensor) not in (None, TokenAxis(1, 3)) for tensor in node.inputs):
                raise MixesTokensError("the rotary embedding does not get [batch, tokens, ...]", node)
            return TokenAxis(1, 3)
        first = self._first(node)
        if node.op == RMS_NORM.name:
            return self._away_from(node, first, first.rank - 1)
        if node.op in _CONCEPTS:
            return first
        raise MixesTokensError(f"{node.op} is not known to keep tokens apart", node)

    def _elementwise(self, node: gs.Node) -> TokenAxis:
        tensors = [tensor for tensor in node.inputs if not tensor.is_empty()]
        rank = max(self._rank(tensor, node) for tensor in tensors)
        found = {(axis.from_right, axis.flat) for axis in map(self.of, tensors) if axis is not None}
        if len(found) != 1:
            raise MixesTokensError(f"the inputs of {node.op} have their tokens along different axes", node)
        from_right, flat = found.pop()
        return TokenAxis(rank - from_right, rank, flat)

    def _away_from(self, node: gs.Node, axis: TokenAxis, *used: int) -> TokenAxis:
        if axis.axis in {index % axis.rank for index in used}:
            raise MixesTokensError(f"{node.op} works along the tokens", node)
        return axis

    def _along(self, node: gs.Node, axis: int) -> TokenAxis:
        first = self._first(node)
        if node.op.endswith("Normalization"):
            return self._away_from(node, first, *range(axis % first.rank, first.rank))
        return self._away_from(node, first, axis)

    def _reduce(self, node: gs.Node) -> TokenAxis:
        first = self._first(node)
        axes = self._ints(node, "axes", 1)
        self._away_from(node, first, *axes)
        if node.attrs.get("keepdims", 1):
            return first
        gone = {axis % first.rank for axis in axes}
        return TokenAxis(first.axis - sum(a < first.axis for a in gone), first.rank - len(gone), first.flat)

    def _ints(self, node: gs.Node, attribute: str, index: int) -> list[int]:
        """Return integers from an attribute or, in newer opsets, a constant input."""
        value: Any = node.attrs.get(attribute)
        if value is None and index < len(node.inputs):
            value = constant_value(node.inputs[index])
        if value is None:
            raise MixesTokensError(f"the {attribute} of {node.op} are not constant", node)
        return [int(item) for item in list(value)]

    def _unsqueeze(self, node: gs.Node) -> TokenAxis:
        first, axes = self._first(node), self._ints(node, "axes", 1)
        rank = first.rank + len(axes)
        new = {axis % rank for axis in axes}
        place = [axis for axis in range(rank) if axis not in new][first.axis]
        return TokenAxis(place, rank, first.flat)

    def _squeeze(self, node: gs.Node) -> TokenAxis:
        first, axes = self._first(node), self._ints(node, "axes", 1)
        gone = {axis % first.rank for axis in axes}
        self._away_from(node, first, *gone)
        return TokenAxis(first.axis - sum(a < first.axis for a in gone), first.rank - len(gone), first.flat)

    def _transpose(self, node: gs.Node) -> TokenAxis:
        first = self._first(node)
        perm = list(node.attrs.get("perm", range(first.rank - 1, -1, -1)))
        return TokenAxis(perm.index(first.axis), first.rank, first.flat)

    def _split(self, node: gs.Node) -> TokenAxis:
        return self._away_from(node, self._first(node), int(node.attrs.get("axis", 0)))

    def _slice(self, node: gs.Node) -> TokenAxis:
        first = self._first(node)
        if len(node.inputs) < 4 or node.inputs[3].is_empty():
            raise MixesTokensError("Slice cuts along all axes", node)
        return self._away_from(node, first, *self._ints(node, "axes", 3))

    def _concat(self, node: gs.Node) -> TokenAxis:
        found = {self.of(tensor) for tensor in node.inputs}
        first = next(axis for axis in found if axis is not None)
        if len(found) > 1:
            raise MixesTokensError("Concat joins tensors whose tokens are along different axes", node)
        return self._away_from(node, first, int(node.attrs["axis"]))

    def _matmul(self, node: gs.Node) -> TokenAxis:
        first = self._first(node)
        if first.rank < 2 or self._rank(node.inputs[1], node) != 2:
            raise MixesTokensError("it is no product with a matrix of weights", node)
        return self._away_from(node, first, first.rank - 1)

    def _gemm(self, node: gs.Node) -> TokenAxis:
        first = self._first(node)
        if node.attrs.get("transA", 0):
            raise MixesTokensError("Gemm transposes the text", node)
        return self._away_from(node, first, 1)

    def _gather(self, node: gs.Node) -> TokenAxis:
        data, indices = self.of(node.inputs[0]), self.of(node.inputs[1])
        if data is not None and indices is not None:
            raise MixesTokensError("Gather looks up places that depend on the text in the text", node)
        rank = self._rank(node.inputs[0], node) - 1 + self._rank(node.inputs[1], node)
        axis = int(node.attrs.get("axis", 0)) % self._rank(node.inputs[0], node)
        if indices is not None:
            return TokenAxis(axis + indices.axis, rank, indices.flat)
        assert data is not None
        self._away_from(node, data, axis)
        moved = self._rank(node.inputs[1], node) - 1 if axis < data.axis else 0
        return TokenAxis(data.axis + moved, rank, data.flat)

    def _expand(self, node: gs.Node) -> TokenAxis:
        first, after = self._first(node), self._values.shape_of(node.outputs[0])
        wanted = self._batch * self._length if first.flat else self._length
        if after is None or len(after) < first.rank or after[len(after) - first.from_right] != wanted:
            raise MixesTokensError("the sizes after an Expand are not known", node)
        return TokenAxis(len(after) - first.from_right, len(after), first.flat)

    def _reshape(self, node: gs.Node) -> TokenAxis:
        first = self._first(node)
        before, after = self._values.shape_of(node.inputs[0]), self._values.shape_of(node.outputs[0])
        if after is None:
            raise MixesTokensError("the sizes after a Reshape are not known", node)
        if first.flat:
            outer: Dim = self._batch if first.axis == 0 else 0
        elif before is not None:
            outer = product(before[: first.axis])
        else:
            outer = self._batch if first.axis == 1 else 0
        for axis, size in enumerate(after):
            if size == self._length and product(after[:axis]) == outer:
                return TokenAxis(axis, len(after))
        if after and outer == self._batch and after[0] == self._batch * self._length:
            return TokenAxis(0, len(after), flat=True)
        raise MixesTokensError(f"Reshape to [{', '.join(map(str, after))}] does not keep the tokens together", node)
