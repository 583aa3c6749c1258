"""Speed of the compiled block quantizer: gigabytes of weights in per second of one thread's CPU time, best of several.

python benchmarks/custom_ops/quantize_tile.py [--rows K] [--columns N]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import ml_dtypes
import numpy as np

from onnxslim_llm.custom_ops import native
from onnxslim_llm.custom_ops.layout import BlockSpec, Layout, TileBuffers

Array = np.ndarray[Any, Any]
REPEATS = 5


def speed(weight: Array, spec: BlockSpec, method: str, layout: Layout, isa: str) -> float:
    """Return GB/s of input."""
    best = float("inf")
    for _ in range(REPEATS):
        buffers = TileBuffers.allocate(spec, layout, *weight.shape)
        start = time.thread_time()
        native.quantize_into(weight, buffers, 0, method, None, isa)
        best = min(best, time.thread_time() - start)
    return weight.nbytes / best / 1e9


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=5632)
    arguments = parser.parse_args()
    values = np.random.default_rng(0).standard_normal((arguments.rows, arguments.columns), np.float32)
    half = values.astype(np.float16)
    asymmetric = BlockSpec(symmetric=False)
    cases: list[tuple[str, Array, BlockSpec, str, Layout]] = [
        ("int4 block 32", half, BlockSpec(), "rtn", Layout.NBITS),
        ("int4 block 32, search", half, BlockSpec(), "search", Layout.NBITS),
        ("int4 block 32, hqq", half, BlockSpec(), "hqq", Layout.NBITS),
        ("uint4 block 32", half, asymmetric, "rtn", Layout.NBITS),
        ("uint4 block 32, search", half, asymmetric, "search", Layout.NBITS),
        ("int4 block 32, DequantizeLinear", half, BlockSpec(), "rtn", Layout.BLOCKED_KN),
        ("int4 block 32, from [N, K]", np.asfortranarray(half), BlockSpec(), "rtn", Layout.NBITS),
        ("int4 block 128", half, BlockSpec(block=128), "rtn", Layout.NBITS),
        ("int8 per channel", half, BlockSpec(8, -1), "rtn", Layout.NBITS),
        ("int4 block 32, bfloat16", values.astype(ml_dtypes.bfloat16), BlockSpec(), "rtn", Layout.NBITS),
        ("int4 block 32, float32", values, BlockSpec(), "rtn", Layout.NBITS),
    ]
    isas = native.supported_isas()
    print(f"| float16 [{arguments.rows}, {arguments.columns}] in, GB/s | {' | '.join(isas)} |")
    print("|---|" + "---:|" * len(isas))
    for name, weight, spec, method, layout in cases:
        print(f"| {name} | " + " | ".join(f"{speed(weight, spec, method, layout, isa):.2f}" for isa in isas) + " |")


if __name__ == "__main__":
    main()
