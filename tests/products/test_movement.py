"""Columns through moves: splits, slices, gathers, and what is more than a move."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.products.movement import columns_of_moves, moves_before

OPSET = 21


def columns(body: str, rank: int = 3, size: int = 24, **constants: Any) -> list[int] | None:
    given = "b, s, 24" if rank == 3 else "m, 24"
    head = f'<ir_version: 10, opset_import: ["" : {OPSET}]>'
    text = f"{head} agraph (float[{given}] x, int64[3] shape) => (float[b, s, n] y)"
    proto: onnx.ModelProto = parser.parse_model(f"{text} {{ {body} }}")
    proto.graph.initializer.extend(numpy_helper.from_array(np.array(v), k) for k, v in constants.items())
    model = from_proto(proto)
    infer_shapes(model)
    moves = moves_before(model.graph.outputs[0])
    found = columns_of_moves(moves, size, OPSET)
    return None if found is None else found.tolist()


@pytest.mark.parametrize(
    ("body", "constants", "expected"),
    [
        ("a, y, c = Split <axis = -1> (x, sizes)", {"sizes": [8, 4, 12]}, range(8, 12)),
        ("y = Slice (x, at, end, axes)", {"at": [16], "end": [24], "axes": [2]}, range(16, 24)),
        (
            "h = Reshape (x, heads) g = Gather <axis = 3> (h, one) y = Reshape (g, flat)",
            {"heads": [0, 0, 2, 3, 4], "one": 1, "flat": [0, 0, 8]},
            [4, 5, 6, 7, 16, 17, 18, 19],
        ),
        (
            "h = Reshape (x, heads) t = Transpose <perm = [0, 1, 3, 2]> (h) y = Reshape (t, flat)",
            {"heads": [0, 0, 4, 6], "flat": [0, 0, 24]},
            np.arange(24).reshape(4, 6).T.reshape(-1),
        ),
    ],
)
def test_moves_are_followed(body: str, constants: dict[str, Any], expected: Any) -> None:
    assert columns(body, **constants) == list(expected)


def test_a_reshape_to_tokens_leaves_columns_alone() -> None:
    text = "r = Reshape (x, shape) y, z = Split <axis = -1> (r, sizes)"
    assert columns(text, rank=3, sizes=[12, 12]) is None  # nobody knows what `shape` says
    known = "r = Reshape (x, given) y, z = Split <axis = -1> (r, sizes)"
    assert columns(known, rank=2, sizes=[12, 12], given=[-1, 3, 24]) == list(range(12))


@pytest.mark.parametrize(
    "body",
    [
        "y = Transpose <perm = [1, 0, 2]> (x)",  # tokens and batch change places
        "h = Reshape (x, wide) y = Slice (h, at, end, axes)",  # one token's columns go to another
    ],
)
def test_what_mixes_tokens_is_more_than_a_move(body: str) -> None:
    used = {"wide": [2, 2, 36], "at": [0], "end": [24], "axes": [2]} if "wide" in body else {}
    assert columns(body, **used) is None


def test_nothing_moves() -> None:
    assert columns("y = Relu (x)") == list(range(24))
