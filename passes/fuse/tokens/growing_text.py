"""Whether what a model computes from sizes and masks stays as it is for earlier tokens when the text grows.

A cache keeps what was computed for earlier tokens. Rotary angles that change with the length of the text (dynamic
scaling, a switch to other factors for long texts) are different ones then for tokens that are in the cache already.
Shown operator by operator, like everything that a cache relies on.
"""

from __future__ import annotations

from typing import Literal

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Expr
from onnxslim_llm.passes.fuse.tokens.axes import ELEMENTWISE, MixesTokensError
from onnxslim_llm.passes.fuse.tokens.whole_text import depends_on
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["GrowingText"]

#: "same": no number of tokens in it. "size": depends on the number of tokens. "tokens": something for each token, that
#: of earlier ones not depending on later ones.
_Kind = Literal["same", "size", "tokens"]

#: Operators that may count: numbers from numbers.
_COUNTS = frozenset(
    ["Concat", "Expand", "Gather", "ReduceMax", "ReduceMin", "ReduceProd", "Reshape", "Slice", "Squeeze", "Unsqueeze"]
)
#: Operators that move the elements of the first input, in a way that may depend on sizes.
_MOVES = frozenset(["Expand", "Reshape", "Squeeze", "Transpose", "Trilu", "Unsqueeze"])
#: Operators whose first input may be a constant that the others choose from or add to.
_MIXED = frozenset(["Concat", "Gather", "GatherElements", "MatMul"])


class GrowingText:
    """Judges tensors that do not depend on the text itself.

    Args:
        values: Shapes and sizes of the model's tensors.
        length: The number of tokens.
        mask: The mask of the text, if there is one: it only grows.
    """

    def __init__(self, values: SymbolicValues, length: Expr, mask: gs.Tensor | None) -> None:
        self._values, self._length, self._mask = values, length, mask
        self._known: dict[int, _Kind] = {}

    def check(self, tensor: gs.Tensor) -> None:
        """Check a tensor that meets the text.

        Raises:
            MixesTokensError: It may change for earlier tokens when the text grows; names the node.
        """
        self._kind(tensor)

    def _kind(self, tensor: gs.Tensor) -> _Kind:
        if not isinstance(tensor, gs.Variable) or tensor.is_empty():
            return "same"
        if tensor is self._mask:
            return "tokens"
        if id(tensor) not in self._known:
            self._known[id(tensor)] = self._of(tensor, tensor.inputs[0]) if tensor.inputs else "size"
        return self._known[id(tensor)]

    def _is_fixed(self, tensor: gs.Tensor) -> bool:
        """Whether all numbers of a small tensor are known not to depend on the number of tokens."""
        value = self._values.value_of(tensor)
        return value is not None and not any(v is None or depends_on(v, self._length) for v in value.reshape(-1))

    def _along(self, tensor: gs.Tensor) -> set[int]:
        """Return the axes that run over tokens."""
        shape = self._values.shape_of(tensor)
        return set() if shape is None else {axis for axis, dim in enumerate(shape) if depends_on(dim, self._length)}

    def _of(self, tensor: gs.Variable, node: gs.Node) -> _Kind:
        if node.op in ("Shape", "Size"):
            return "same" if self._is_fixed(tensor) else "size"
        kinds = [self._kind(source) for source in node.inputs]
        if set(kinds) <= {"same"} or self._is_fixed(tensor):
            return "same"
        if normal_domain(node.domain) == "":
            if node.op == "Range":
                return self._range(node, kinds)
            if node.op == "ConstantOfShape":
                return "tokens" if self._along(tensor) else "same"
            if "tokens" not in kinds and (node.op in ELEMENTWISE or node.op in _COUNTS):
                # Expanding or cutting a constant gives something for each token.
                return self._of_sizes(tensor, node, kinds)
            if kinds[0] == "tokens" or node.op in ELEMENTWISE or node.op in _MIXED:
                return self._of_tokens(tensor, node, kinds)
        raise self._changes(node)

    def _changes(self, node: gs.Node) -> MixesTokensError:
        return MixesTokensError(f"what {node.op} computes may change for earlier tokens when the text grows", node)

    def _range(self, node: gs.Node, kinds: list[_Kind]) -> _Kind:
        if kinds[0] != "same" or kinds[2] != "same":
            raise self._changes(node)
        return "tokens"

    def _of_sizes(self, tensor: gs.Variable, node: gs.Node, kinds: list[_Kind]) -> _Kind:
        if not self._along(tensor):
            return "size"
        if node.op == "Expand" and kinds[0] == "same":
            return "tokens"
        if node.op == "Slice" and kinds[0] == kinds[1] == "same":  # the first so many rows of a table
            return "tokens"
        raise self._changes(node)

    def _of_tokens(self, tensor: gs.Variable, node: gs.Node, kinds: list[_Kind]) -> _Kind:
        first = node.inputs[0]
        if node.op in ELEMENTWISE:
            fine = "size" not in kinds
        elif node.op in _MOVES:
            fine = True
        elif node.op == "Gather":
            fine = kinds[0] == "same" or (kinds[1] == "same" and not self._crosses(node, first, {_axis(node, 0)}))
        elif node.op == "MatMul":
            shape = self._values.shape_of(first)
            inner = set() if shape is None else {len(shape) - 1}
            fine = shape is not None and "size" not in kinds and not self._crosses(node, first, inner)
        elif node.op == "Concat":
            fine = "size" not in kinds and not self._crosses(node, tensor, {_axis(node, 0)})
        elif node.op == "GatherElements":
            fine = kinds[0] == "same"
        elif node.op == "Split":
            fine = not self._crosses(node, first, {_axis(node, 0)})
        elif node.op == "Tile":
            fine = kinds[1] == "same"
        elif node.op == "CumSum":
            fine = not node.attrs.get("reverse", 0) and kinds[1] == "same"
        elif node.op == "Slice":
            axes = constant_value(node.inputs[3]) if len(node.inputs) > 3 else None
            fine = axes is not None and not self._crosses(node, first, {int(axis) for axis in axes.reshape(-1)})
        else:
            fine = False
        if not fine:
            raise self._changes(node)
        return "tokens"

    def _crosses(self, node: gs.Node, tensor: gs.Tensor, axes: set[int]) -> bool:
        """Whether any of the axes of a tensor runs over tokens, or is not known not to."""
        shape = self._values.shape_of(tensor)
        return shape is None or bool(self._along(tensor) & {axis % len(shape) for axis in axes})


def _axis(node: gs.Node, default: int) -> int:
    return int(node.attrs.get("axis", default))
