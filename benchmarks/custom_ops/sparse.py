"""Products with sparse packed weights beside the same weights packed densely, in ONNX Runtime.

    python benchmarks/custom_ops/sparse.py [--shapes 2048x2048,4096x4096] [--rows 1,64] [--rounds 21]
    python benchmarks/custom_ops/sparse.py --threads 2 --clock wall

A model holds several copies of one int4 weight (block 32, half scales), more than the caches hold, and multiplies the
same rows by each of them. The forms run in turn: "dense"; "load", sparse in the file and expanded when the session
opens; "auto", the same with the sparse weight for few rows where that is faster; "run", sparse in memory and expanded
in the product. Printed are the bytes of the sparse form per dense byte, the microseconds of a dense product (20th
percentile), and for the other forms the median of the ratios of neighbouring samples. On one thread the processor's
time of that thread is measured, so that other processes disturb less.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.custom_ops import kernels, ops, sparse_kernels
from onnxslim_llm.custom_ops.packed import PackedScheme
from onnxslim_llm.custom_ops.packing import pack_bits

Array = NDArray[Any]

PATTERNS = {"50 %": 0.5, "2:4": 0.5, "75 %": 0.25, "90 %": 0.1}
"""Zeros, and the density that they leave."""
FORMS = ("dense", "load", "auto", "run")
CLOCKS = {"cpu": time.thread_time, "wall": time.perf_counter}
ZERO = 8
"""The code of 0 in 4 bits."""
ROTATED_BYTES = 160 << 20
"""Of dense weights in a session that computes few rows."""


def pruned_weight(scheme: PackedScheme, pattern: str, rng: np.random.Generator) -> Array:
    """A packed weight with so many codes of 0, and none of the others by accident."""
    shape = (scheme.columns, scheme.rows // scheme.block, scheme.block)
    codes = rng.integers(0, 15, shape, np.uint8)
    codes += codes >= ZERO
    if pattern == "2:4":
        fours = codes.reshape(-1, 4)
        gone = np.argsort(rng.random(fours.shape), axis=1)[:, :2]
        np.put_along_axis(fours, gone, ZERO, axis=1)
    else:
        codes[rng.random(shape) >= PATTERNS[pattern]] = ZERO
    scales = (0.005 + 0.01 * rng.random(shape[:2])).astype(np.float16)
    return kernels.pack(scheme, pack_bits(codes, 4), scales, None)


def session(weight: Array, scheme: PackedScheme, copies: int, expand: str, threads: int) -> Any:
    """A model of so many products of one input."""
    attributes = {"K": scheme.rows, "N": scheme.columns, "bits": 4, "block_size": scheme.block, "expand": expand}
    nodes = [
        helper.make_node("MatMulPacked", ["a", f"B{i}"], [f"y{i}"], domain=ops.DOMAIN, **attributes)
        for i in range(copies)
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["m", scheme.rows])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", scheme.columns]) for i in range(copies)],
        [numpy_helper.from_array(weight, f"B{i}") for i in range(copies)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    ops.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(sessions: dict[str, Any], feeds: dict[str, Array], rounds: int, clock: str) -> dict[str, Array]:
    """Seconds of each form, run in turn."""
    samples: dict[str, list[float]] = {form: [] for form in sessions}
    now = CLOCKS[clock]
    for opened in sessions.values():
        opened.run(None, feeds)
    for _ in range(rounds):
        for form, opened in sessions.items():
            start = now()
            opened.run(None, feeds)
            samples[form].append(now() - start)
    return {form: np.array(found) for form, found in samples.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048x2048,4096x4096")
    parser.add_argument("--rows", default="1,64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu: for one thread")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{kernels.best_isa()}, {arguments.threads} threads")
    print("| K x N | zeros | bytes | rows | dense us | load | auto | run |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        k, n = map(int, shape.split("x"))
        scheme = PackedScheme(k, n)
        copies = max(1, round(ROTATED_BYTES / scheme.size))
        for pattern in arguments.patterns.split(","):
            dense = pruned_weight(scheme, pattern, rng)
            sparse = sparse_kernels.make_sparse(dense)
            sessions = {
                form: session(dense if form == "dense" else sparse, scheme, copies, form if form != "dense" else "auto",
                              arguments.threads)
                for form in FORMS
            }  # fmt: skip
            for rows in map(int, arguments.rows.split(",")):
                feeds = {"a": rng.standard_normal((rows, k)).astype(np.float32)}
                found = measure(sessions, feeds, max(5, arguments.rounds // (1 if rows <= 16 else 4)), arguments.clock)
                ratios = " | ".join(f"{np.median(found[form] / found['dense']):.2f}" for form in FORMS[1:])
                own = 1e6 * float(np.percentile(found["dense"], 20)) / copies
                share = sparse.size / dense.size
                print(f"| {shape} | {pattern} | {share:.3f} | {rows} | {own:.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
