"""Many threads at once: one session, several sessions, sessions that are opened while others run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from op_models import TYPES, Array, attributes, model, needs_library, open_with_library, packed_weight, run

from onnxslim_llm.custom_ops.packed import PackedScheme

pytestmark = needs_library

SCHEME = PackedScheme(rows=256, columns=160, bits=4, block=32)
FLOAT = TYPES[np.dtype(np.float32)]
CALLERS, ROUNDS = 6, 25


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
    import onnx

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
    import onnx

    x = inputs(0)[1]
    expected = run(open_with_library(onnx.ModelProto.FromString(product())), {"a": x})

    def live(number: int) -> None:
        for _ in range(5):
            session = open_with_library(onnx.ModelProto.FromString(product()), threads=1 + number % 2)
            for _ in range(5):
                np.testing.assert_array_equal(run(session, {"a": x}), expected)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(live, range(CALLERS)))
