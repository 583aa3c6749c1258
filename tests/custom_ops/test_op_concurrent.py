"""Many threads at once: one session, several sessions, sessions that are opened while others run."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from op_models import TYPES, Array, attributes, model, needs_library, open_with_library, packed_weight, run

from onnxslim_llm.custom_ops import ops
from onnxslim_llm.custom_ops.packed import PackedScheme

pytestmark = needs_library

SCHEME = PackedScheme(rows=256, columns=160, bits=4, block=32)
FLOAT = TYPES[np.dtype(np.float32)]
CALLERS, ROUNDS = 6, 25
STRESS_SECONDS = 8


def product() -> bytes:
    given = {"a": np.ones((1, 256), np.float32)}
    proto = model("MatMulPacked", given, {"B": packed_weight(SCHEME)}, FLOAT, **attributes(SCHEME))
    text: bytes = proto.SerializeToString()
    return text


def inputs(caller: int) -> list[Array]:
    # 1 row: memory on the stack; 90 rows: from the session's allocator.
    rng = np.random.default_rng(caller)
    return [rng.standard_normal((rows, 256)).astype(np.float32) for rows in (1, 3, 17, 90)]


@pytest.mark.parametrize("threads", [1, 2])
def test_one_session_serves_many_callers(threads: int) -> None:
    session = open_with_library(onnx.ModelProto.FromString(product()), threads)
    expected = {(c, i): run(session, {"a": x}) for c in range(CALLERS) for i, x in enumerate(inputs(c))}

    def call(caller: int) -> None:
        mine = inputs(caller)
        for _ in range(ROUNDS):
            for i, x in enumerate(mine):
                np.testing.assert_array_equal(run(session, {"a": x}), expected[caller, i])

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(call, range(CALLERS)))


def test_sessions_open_and_close_while_others_run() -> None:
    x = inputs(0)[1]
    expected = run(open_with_library(onnx.ModelProto.FromString(product())), {"a": x})

    def live(number: int) -> None:
        for _ in range(5):
            session = open_with_library(onnx.ModelProto.FromString(product()), threads=1 + number % 2)
            for _ in range(5):
                np.testing.assert_array_equal(run(session, {"a": x}), expected)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(live, range(CALLERS)))


def everything(dtype: Any) -> tuple[onnx.ModelProto, dict[int, dict[str, Array]]]:
    """A look-up, a gated product and one with all that can be added; inputs by their number of tokens."""
    table, paired = packed_weight(SCHEME), packed_weight(replace(SCHEME, paired=True))
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype) / 8

    constants = {"T": table, "B": table, "G": paired, "bias": floats(160)}
    constants |= {"U": floats(256, 3).astype(np.float32), "V": floats(3, 160).astype(np.float32)}
    plain = attributes(SCHEME)
    nodes = [
        helper.make_node("GatherPacked", ["T", "ids"], ["looked_up"], domain=ops.DOMAIN, **plain),
        helper.make_node("Cast", ["looked_up"], ["x"], to=TYPES[np.dtype(dtype)]),
        helper.make_node("MatMulPacked", ["x", "G"], ["gated"], domain=ops.DOMAIN, activation="silu_gate", **plain),
        helper.make_node(
            "MatMulPacked", ["x", "B", "bias", "r", "U", "V"], ["y"], domain=ops.DOMAIN, activation="gelu", **plain
        ),
    ]
    kind = TYPES[np.dtype(dtype)]
    inputs = [
        helper.make_tensor_value_info("ids", TYPES[np.dtype(np.int64)], ["tokens"]),
        helper.make_tensor_value_info("r", kind, ["tokens", 160]),
    ]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in ("gated", "y")]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    proto = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, tensors), opset_imports=imports)
    proto.ir_version = 8
    feeds = {n: {"ids": rng.integers(0, 160, n), "r": floats(n, 160)} for n in (1, 2, 16, 33, 150)}
    return proto, feeds


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_stress(dtype: Any) -> None:
    """Callers of shared sessions, of sessions of their own and new registrations, all the time at once."""
    proto, feeds = everything(dtype)
    expected = {n: open_with_library(proto).run(None, x) for n, x in feeds.items()}
    shared = [open_with_library(proto, threads) for threads in (1, 2, 3)]
    end = time.monotonic() + STRESS_SECONDS

    def live(number: int) -> int:
        rng, rounds = np.random.default_rng(number), 0
        while time.monotonic() < end:
            own = rng.random() < 0.1
            session = open_with_library(proto, int(rng.integers(1, 4))) if own else shared[number % len(shared)]
            n = int(rng.choice(list(feeds)))
            for actual, wanted in zip(session.run(None, feeds[n]), expected[n], strict=True):
                np.testing.assert_array_equal(actual, wanted)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(CALLERS) as pool:
        rounds = list(pool.map(live, range(CALLERS)))
    assert min(rounds) > 0
