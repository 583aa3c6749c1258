"""Runs in another Python with another ONNX Runtime: every model of a folder, against the results beside it.

    python op_release_check.py LIBRARY FOLDER

FOLDER holds NAME.onnx with NAME.npz (inputs, and "expected"); BAD_NAME.onnx, which must not open; and
FALLBACK_NAME.onnx with a function body that says 42 where the operator would not. Needs nothing but numpy and
onnxruntime.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

TOLERANCE = 2.0**-9  # of the largest value; half precision has 11 bits


def open_session(model: Path, library: str | None, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def check(session: onnxruntime.InferenceSession, stored: dict[str, np.ndarray]) -> None:
    expected = stored.pop("expected")
    limit = TOLERANCE * np.abs(expected.astype(np.float64)).max()

    def once(_: int) -> None:
        actual = session.run(None, stored)[0]
        assert actual.dtype == expected.dtype, actual.dtype
        assert actual.shape == expected.shape, actual.shape
        assert np.abs(actual.astype(np.float64) - expected).max() <= limit

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(once, range(6)))


def main(library: str, folder: Path) -> None:
    done = 0
    for model in sorted(folder.glob("*.onnx")):
        if model.name.startswith("BAD_"):
            try:
                open_session(model, library, 1)
            except Exception:
                done += 1
                continue
            raise AssertionError(f"{model.name} opens")
        stored = dict(np.load(model.with_suffix(".npz")))
        for threads in (1, 2):
            check(open_session(model, library, threads), dict(stored))
        if model.name.startswith("FALLBACK_"):
            stored.pop("expected")
            body = open_session(model, None, 1).run(None, stored)[0]
            assert (body == 42).all(), "without the library the function's body computes"
        done += 1
    print(f"{onnxruntime.__version__}: {done} models")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
