"""How fast weights change between MatMulNBits's arrays and the packed layout, on one thread.

    python benchmarks/custom_ops/packing.py

Prints megabytes of packed weight a second (the best of several runs of a weight that fits into no second-level cache)
for every width, with and without zero points, in both directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from onnxslim_llm.custom_ops import kernels
from onnxslim_llm.custom_ops.packed import PackedScheme

ROWS, COLUMNS, BLOCK = 2048, 8192, 32
RUNS = 7


def fastest(action: Callable[[], object]) -> float:
    """Seconds of processor time: the same on a machine that others use, too."""
    times = []
    for _ in range(RUNS):
        start = time.thread_time()
        action()
        times.append(time.thread_time() - start)
    return min(times)


def main() -> None:
    """Measure and print."""
    rng = np.random.default_rng(0)
    blocks = ROWS // BLOCK
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            scheme = PackedScheme(ROWS, COLUMNS, bits, BLOCK, symmetric)
            codes = rng.integers(0, 256, (COLUMNS, blocks, BLOCK * bits // 8), np.uint8)
            scales = rng.standard_normal((COLUMNS, blocks)).astype(np.float16)
            zeros = None if symmetric else rng.integers(0, 256, (COLUMNS, -(-blocks * bits // 8)), np.uint8)
            out = np.zeros(scheme.size, np.uint8)
            pack = fastest(lambda: kernels.pack(scheme, codes, scales, zeros, out=out))  # noqa: B023 (called at once)
            unpack = fastest(lambda: kernels.unpack(out, scheme))  # noqa: B023
            kind = "symmetric" if symmetric else "zero points"
            rates = (scheme.size / seconds / 1e6 for seconds in (pack, unpack))
            print(f"{bits} bits  {kind:<11}  pack {next(rates):6.0f} MB/s  unpack {next(rates):6.0f} MB/s")


if __name__ == "__main__":
    main()
