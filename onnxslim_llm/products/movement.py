"""Which columns of a product a tensor consists of, when nothing but moves lies between: splits, slices, reshapes, ...

The moves are carried out on the numbers of the columns themselves, for a few tokens, so that every way in which
exporters take queries, keys and values out of one product is understood alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.evaluate import evaluate
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["Moves", "columns_of_moves", "moves_before"]

_MOVES = frozenset(
    {"Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
#: Batch and tokens that the moves are tried with: different, so that an exchange of the two shows.
_BATCH, _TOKENS = 2, 3


@dataclass(frozen=True)
class Moves:
    """A chain of nodes that only put elements elsewhere.

    Attributes:
        source: The tensor before the first of them.
        steps: (node, its output on the chain), first to last.
    """

    source: gs.Tensor
    steps: tuple[tuple[gs.Node, gs.Variable], ...]


def moves_before(tensor: gs.Tensor) -> Moves:
    """Return the moves that a tensor has gone through last; none if something else makes it."""
    steps: list[tuple[gs.Node, gs.Variable]] = []
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        node = tensor.inputs[0]
        if normal_domain(node.domain) != "" or node.op not in _MOVES:
            break
        steps.append((node, tensor))
        tensor = node.inputs[0]
    return Moves(tensor, tuple(reversed(steps)))


def columns_of_moves(moves: Moves, columns: int, opset: int) -> NDArray[np.int64] | None:
    """Return which columns [n] of the source [..., columns] each token's row after the moves [B, S, n] has.

    None if a move depends on more than sizes and constants, or exchanges tokens.
    """
    value: NDArray[Any] = np.arange(_BATCH * _TOKENS * columns).reshape(_BATCH, _TOKENS, columns)
    for node, output in moves.steps:
        if (
            value.shape[-1] == columns
            and value.size == _BATCH * _TOKENS * columns
            and _keeps_rows(node, output, columns)
        ):
            value = value.reshape(_BATCH, _TOKENS, columns)
            continue
        operands = [None if t.is_empty() else constant_value(t) for t in node.inputs[1:]]
        if any(found is None and not t.is_empty() for found, t in zip(operands, node.inputs[1:], strict=True)):
            return None
        results = evaluate(node, [value, *operands], opset)
        if results is None:
            return None
        value = results[next(i for i, t in enumerate(node.outputs) if t is output)]
    if value.ndim != 3 or value.shape[:2] != (_BATCH, _TOKENS):
        return None
    first = value[0, 0].astype(np.int64)
    rows = columns * np.arange(_BATCH * _TOKENS).reshape(_BATCH, _TOKENS, 1)
    alike = bool((first < columns).all()) and np.array_equal(value, rows + first)
    return first if alike else None


def _keeps_rows(node: gs.Node, output: gs.Variable, columns: int) -> bool:
    """Return whether a Reshape only counts the rows [..., columns] in another way, whatever its shape is made of."""
    if node.op not in ("Reshape", "Flatten"):
        return False
    shapes = [tensor.shape for tensor in (node.inputs[0], output)]
    ranks = [len(shape) if shape is not None else 0 for shape in shapes]
    same = all(shape is not None and len(shape) > 1 and shape[-1] == columns for shape in shapes)
    return same and ranks[1] == 3
