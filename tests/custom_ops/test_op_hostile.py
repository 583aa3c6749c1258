"""Models that are wrong on purpose: ONNX Runtime reports an error, and the process goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_models import TYPES, Array, attributes, model, needs_library, open_with_library, packed_weight, run

from onnxslim_llm.custom_ops.packed import HEADER_BYTES, PackedScheme, header

pytestmark = needs_library

SCHEME = PackedScheme(rows=96, columns=40, bits=4, block=32)
FLOAT = TYPES[np.dtype(np.float32)]
A = np.ones((2, 96), np.float32)


def session(b: Array, op: str = "MatMulPacked", **changed: Any) -> Any:
    given, constants = {"a": A}, {"B": b}
    order = ["a", "B"]
    if op == "GatherPacked":
        given, order = {"a": np.zeros(2, np.int64)}, ["B", "a"]
    found = {**attributes(SCHEME), **changed}
    return open_with_library(
        model(op, given, constants, FLOAT, inputs=order, **{k: v for k, v in found.items() if v is not None})
    )


def edited(**fields: Any) -> Callable[[Array], Array]:
    """Replace parts of the header: name -> (offset, bytes)."""

    def edit(b: Array) -> Array:
        changed = b.copy()
        for offset, data in fields.values():
            changed[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        return changed

    return edit


DAMAGED: dict[str, Callable[[Array], Array]] = {
    "empty": lambda b: b[:0],
    "no whole header": lambda b: b[: HEADER_BYTES - 1],
    "header only": lambda b: b[:HEADER_BYTES],
    "one byte short": lambda b: b[:-1],
    "one byte long": lambda b: np.concatenate([b, b[:1]]),
    "a matrix": lambda b: b.reshape(1, -1),
    "floats": lambda b: b.astype(np.float32),
    "signed": lambda b: b.view(np.int8),
    "another magic": edited(magic=(0, b"x")),
    "a later version": edited(version=(8, b"\xff\xff")),
    "a header of no size": edited(size=(10, b"\0\0")),
    "5 bits": edited(bits=(12, b"\5")),
    "0 bits": edited(bits=(12, b"\0")),
    "unknown scales": edited(scales=(13, b"\7")),
    "zero points that are not there": edited(zeros=(14, b"\1")),
    "an unknown order of columns": edited(order=(15, b"\2")),
    "paired columns": edited(order=(15, b"\1")),
    "no rows": edited(rows=(16, b"\0" * 8)),
    "negative rows": edited(rows=(16, b"\xff" * 8)),
    "rows beyond all memory": edited(rows=(16, b"\xff" * 7 + b"\x7f")),
    "columns beyond all memory": edited(columns=(24, b"\xff" * 7 + b"\x7f")),
    "a block of 0": edited(block=(32, b"\0" * 4)),
    "a block of 2^31": edited(block=(32, b"\0\0\0\x80")),
    "no chunk rows": edited(chunk=(36, b"\0" * 4)),
    "huge chunks": edited(chunk=(40, b"\xff" * 4)),
    "strips of 1 column": edited(strip=(44, b"\1\0\0\0")),
    "a negative payload": edited(payload=(48, b"\xff" * 8)),
    "another payload": edited(payload=(48, b"\1" + b"\0" * 7)),
    "something in the reserve": edited(reserve=(56, b"\1")),
    "the header of a larger weight": lambda b: np.concatenate([header(replace(SCHEME, columns=56)), b[HEADER_BYTES:]]),
}


@pytest.mark.parametrize("op", ["MatMulPacked", "GatherPacked"])
@pytest.mark.parametrize("damage", list(DAMAGED))
def test_damaged_weights(damage: str, op: str) -> None:
    with pytest.raises(Exception, match=r"packed weight|Type Error|is packed for a gate|table is packed"):
        session(DAMAGED[damage](packed_weight(SCHEME)), op)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"K": None}, "integer attribute K is missing|Required attribute"),
        ({"N": None}, "integer attribute N is missing|Required attribute"),
        ({"K": -96}, "K = -96 is not between"),
        ({"N": 0}, "N = 0 is not between"),
        ({"N": 2**62}, "is not between"),
        ({"bits": 9}, "bits = 9 is not between"),
        ({"block_size": 8}, "block_size = 8 is not between"),
        ({"K": 95}, "95"),
        ({"N": 41}, "the packed weight has K, N, bits, block_size 96, 40, 4, 32; the node 96, 41, 4, 32"),
        ({"bits": 8}, "the node 96, 40, 8, 32"),
        ({"K": "96"}, "K"),
        ({"accuracy": "best"}, "accuracy is none of exact, bf16, int8"),
        ({"accuracy": "x" * 1000}, "accuracy is none of"),
        ({"activation": "relu"}, "activation is none of none, silu"),
        ({"activation": "silu_gate"}, "B is not packed for a gate"),
    ],
)
def test_attributes(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        session(packed_weight(SCHEME), **changed)


def test_a_weight_that_is_no_initializer() -> None:
    b = packed_weight(SCHEME)
    proto = model("MatMulPacked", {"a": A, "B": b}, {}, FLOAT, **attributes(SCHEME))
    with pytest.raises(Exception, match="the packed weight must be an initializer that nobody can replace"):
        open_with_library(proto)


def test_a_weight_that_callers_may_replace() -> None:
    proto = model("MatMulPacked", {"a": A, "B": packed_weight(SCHEME)}, {}, FLOAT, **attributes(SCHEME))
    constant = model("MatMulPacked", {"a": A}, {"B": packed_weight(SCHEME)}, FLOAT, **attributes(SCHEME))
    proto.graph.initializer.extend(constant.graph.initializer)
    with pytest.raises(Exception, match="must be an initializer that nobody can replace"):
        open_with_library(proto)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": np.ones((2, 95), np.float32)}, "A is \\[2 x 95\\]; its last dimension must be K = 96"),
        ({"a": np.ones((), np.float32)}, "A is \\[no dimension\\]"),
        ({"a": np.ones((1,) * 8 + (96,), np.float32)}, "9 dimensions, more than 8"),
        ({"bias": np.ones(39, np.float32)}, "the bias is \\[39\\], not \\[40\\]"),
        ({"bias": np.ones((1, 40), np.float32)}, "the bias is \\[1 x 40\\]"),
        ({"residual": np.ones((1, 40), np.float32)}, "the residual is \\[1 x 40\\], the output \\[2 x 40\\]"),
        ({"u": np.ones((96, 2), np.float32)}, "U and V go together"),
        (
            {"u": np.ones((96, 2), np.float32), "v": np.ones((3, 40), np.float32)},
            "U is \\[96 x 2\\] and V \\[3 x 40\\]",
        ),
        ({"u": np.ones(96, np.float32), "v": np.ones((1, 40), np.float32)}, "U is \\[96\\]"),
        ({"u": np.ones((96, 0), np.float32), "v": np.ones((0, 40), np.float32)}, "U is \\[96 x 0\\]"),
    ],
)
def test_tensors_that_do_not_fit(parts: dict[str, Array], message: str) -> None:
    given = {"a": A, **parts}
    order = ["a", "B", *(name if name in given else "" for name in ("bias", "residual", "u", "v"))]
    proto = model("MatMulPacked", given, {"B": packed_weight(SCHEME)}, FLOAT, inputs=order, **attributes(SCHEME))
    opened = open_with_library(proto)
    with pytest.raises(Exception, match=message):
        run(opened, given)
    with pytest.raises(Exception, match=r"MatMulPacked 'the_node'|more than 8"):
        run(opened, given)


def test_a_dimension_that_is_known_to_be_wrong_is_found_when_the_model_opens() -> None:
    proto = model("MatMulPacked", {"a": A}, {"B": packed_weight(SCHEME)}, FLOAT, **attributes(SCHEME))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 95
    with pytest.raises(Exception, match="the last dimension of A is 95, not K = 96"):
        open_with_library(proto)


@pytest.mark.parametrize("index", [40, -41, 2**62, -(2**63)])
def test_an_index_outside_of_the_table(index: int) -> None:
    opened = session(packed_weight(SCHEME), "GatherPacked")
    with pytest.raises(Exception, match=f"index {index} is outside of the 40 rows of the table"):
        run(opened, {"a": np.array([0, index])})


def test_a_session_goes_on_after_an_error() -> None:
    opened = session(packed_weight(SCHEME))
    expected = run(opened, {"a": A})
    with pytest.raises(Exception, match="last dimension"):
        run(opened, {"a": A[:, :5]})
    np.testing.assert_array_equal(run(opened, {"a": A}), expected)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_random_headers_never_crash(changes: list[tuple[int, int]]) -> None:
    b = packed_weight(SCHEME)
    for offset, value in changes:
        b[offset] = value
    if (b == packed_weight(SCHEME)).all():
        run(session(b), {"a": A})
    else:  # nothing but the true header is accepted
        with pytest.raises(Exception, match="packed"):
            session(b)
