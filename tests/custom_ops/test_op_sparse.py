"""Sparse packed weights in ONNX Runtime: the results of the dense ones, and errors where the bytes are wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from op_models import TYPES, Array, attributes, model, needs_library, open_with_library, run
from sparse_weights import thin_weight

from onnxslim_llm.custom_ops import ops, sparse
from onnxslim_llm.custom_ops.packed import HEADER_BYTES, PackedScheme

pytestmark = needs_library

SCHEME = PackedScheme(rows=160, columns=72)
FLOAT = TYPES[np.dtype(np.float32)]
STRIPS_AT = HEADER_BYTES + 8 * (SCHEME.strips + 1)


def session(b: Array, op: str = "MatMulPacked", scheme: PackedScheme = SCHEME, threads: int = 1, **changed: Any) -> Any:
    given: dict[str, Array] = {"a": np.ones((2, scheme.rows), np.float32)}
    order = ["a", "B"]
    if op == "GatherPacked":
        given, order = {"a": np.zeros(2, np.int64)}, ["B", "a"]
    return open_with_library(
        model(op, given, {"B": b}, FLOAT, inputs=order, **attributes(scheme), **changed), threads=threads
    )


@pytest.mark.parametrize("expand", ops.EXPANDS)
@pytest.mark.parametrize("density", [0.5, 0.1])
@pytest.mark.parametrize("accuracy", ops.ACCURACIES)
def test_results_are_those_of_the_dense_weight(expand: str, density: float, accuracy: str) -> None:
    dense = thin_weight(SCHEME, density)
    opened = session(sparse.make_sparse(dense), threads=2, expand=expand, accuracy=accuracy)
    expected = session(dense, threads=2, accuracy=accuracy)
    for rows in (1, 4, 5, 40):
        a = np.random.default_rng(rows).standard_normal((rows, SCHEME.rows)).astype(np.float32)
        np.testing.assert_array_equal(run(opened, {"a": a}), run(expected, {"a": a}))


@pytest.mark.parametrize("expand", ops.EXPANDS)
def test_a_gate_over_many_strips(expand: str) -> None:
    scheme = PackedScheme(rows=64, columns=2 * 560, symmetric=False, paired=True)
    dense = thin_weight(scheme, 0.3)
    opened = session(sparse.make_sparse(dense), scheme=scheme, expand=expand, activation="silu_gate")
    expected = session(dense, scheme=scheme, activation="silu_gate")
    for rows in (1, 20):
        a = np.random.default_rng(rows).standard_normal((rows, scheme.rows)).astype(np.float32)
        np.testing.assert_array_equal(run(opened, {"a": a}), run(expected, {"a": a}))


def damaged(name: str) -> Array:
    made = sparse.make_sparse(thin_weight(SCHEME, 0.5))
    table = made[HEADER_BYTES:STRIPS_AT].view(np.uint64)
    if name == "one byte short":
        return made[:-1]
    if name == "without the end":
        return made[: -sparse.TAIL_BYTES]
    if name == "the header alone":
        return made[:HEADER_BYTES]
    if name == "a later version":
        made[8] = 9
    if name == "3 bits":
        made[12] = 3
    if name == "more columns":
        made[24] += 16
    if name == "columns beyond all memory":
        made[24:28] = 255
    if name == "a strip that begins beyond all memory":
        table[1] = 2**63
    if name == "strips in another order":
        table[1], table[2] = table[2], table[1]
    if name == "a strip that ends later":
        table[1] += 1
    if name == "one value more in a bitmap":
        made[STRIPS_AT] ^= 255 if made[STRIPS_AT] == 0 else made[STRIPS_AT]
    if name == "all values in all bitmaps":
        made[STRIPS_AT : STRIPS_AT + 128] = 255
    return made


DAMAGED = (
    "one byte short",
    "without the end",
    "the header alone",
    "a later version",
    "3 bits",
    "more columns",
    "columns beyond all memory",
    "a strip that begins beyond all memory",
    "strips in another order",
    "a strip that ends later",
    "one value more in a bitmap",
    "all values in all bitmaps",
)


@pytest.mark.parametrize("expand", ops.EXPANDS)
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_weights_are_refused(name: str, expand: str) -> None:
    with pytest.raises(Exception, match=r"MatMulPacked 'the_node'.*sparse packed weight"):
        session(damaged(name), expand=expand)


def test_random_damage_never_crashes() -> None:
    made = sparse.make_sparse(thin_weight(SCHEME, 0.5))
    rng = np.random.default_rng(0)
    a = np.ones((1, SCHEME.rows), np.float32)
    refused = 0
    for _ in range(150):
        b = made.copy()
        reach = rng.choice([STRIPS_AT, STRIPS_AT + 128, b.size])
        b[rng.integers(HEADER_BYTES, reach, 3)] = rng.integers(0, 256, 3)
        try:
            sparse.parse(b)
        except ValueError:
            refused += 1
            with pytest.raises(Exception, match="sparse packed weight"):
                session(b, expand="run")
        else:
            run(session(b, expand="run"), {"a": a})
    assert 0 < refused < 150


def test_an_unknown_way_to_expand() -> None:
    with pytest.raises(Exception, match="expand is none of auto, load, run"):
        session(sparse.make_sparse(thin_weight(SCHEME, 0.5)), expand="never")


def test_tables_are_never_sparse() -> None:
    with pytest.raises(Exception, match="these bytes are not a packed weight"):
        session(sparse.make_sparse(thin_weight(SCHEME, 0.5)), "GatherPacked")
