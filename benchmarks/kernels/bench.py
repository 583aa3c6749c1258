"""Times our products beside ONNX Runtime's, and beside what the machine can do.

    python benchmarks/kernels/bench.py                         # all of the table, an hour
    python benchmarks/kernels/bench.py --shapes 2048x8192 --rows 1,16,256 --budget 2

Everything that is compared runs in turn within one loop; ratios are of medians. Weights are rotated through more memory
than any cache holds for up to 16 rows, and through fewer copies above, where arithmetic decides. Peers: MatMulNBits at
accuracy levels 0 and 4, blocks 32 and 128, dynamic int8, float32. One line of JSON for each measurement goes to --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from driver import Array, Driver, build, packed_copies, touched
from ort_peers import PEERS, OrtPeer

from onnxslim_llm.custom_ops import kernels
from onnxslim_llm.custom_ops.matmul_reference import Accuracy
from onnxslim_llm.custom_ops.packed import PackedScheme

SHAPES = "2048x2048,2048x8192,8192x2048,4096x4096,4096x14336,2048x128256"
READ_BYTES = 256 << 20
"""Of a reading between the products: as long as a few large ones."""
WORK = 2e10
"""Multiplications of a pass, beyond which fewer copies are used."""


class Candidate(Protocol):
    """Something that can be timed."""

    def seconds(self) -> float:
        """Of one product."""


def copies_for(weight_bytes: float, k: int, n: int, rows: int, rotate: float) -> int:
    """Copies of a weight that leave the caches, fewer where that would take long."""
    whole = max(1, round(rotate / weight_bytes))
    return whole if rows <= 16 else max(1, min(whole, round(WORK / (rows * k * n))))


def measure(candidates: dict[str, Candidate], driver: Driver, buffer: Array, budget: float) -> dict[str, list[float]]:
    """Seconds of each candidate, run in turn; "read" has seconds per byte."""
    found: dict[str, list[float]] = {name: [] for name in (*candidates, "read")}
    for candidate in candidates.values():
        candidate.seconds()
    start = time.perf_counter()
    while time.perf_counter() - start < budget * len(candidates) or len(found["read"]) < 3:
        for name, candidate in candidates.items():
            found[name].append(candidate.seconds())
        found["read"].append(driver.read_seconds(buffer) / buffer.size)
    return found


def run_case(arguments: argparse.Namespace, driver: Driver, buffer: Array, k: int, n: int, rows: int) -> list[Any]:
    """All candidates for one shape and number of rows."""
    candidates: dict[str, Candidate] = {}
    sizes: dict[str, int] = {}
    for block in arguments.blocks:
        scheme = PackedScheme(k, n, block=block)
        copies = copies_for(scheme.size, k, n, rows, arguments.rotate * 1e6)
        weights = packed_copies(scheme, copies)
        for isa in arguments.isas:
            for accuracy in arguments.accuracies:
                name = f"ours_{Accuracy(accuracy).name.lower()}_b{block}_{isa}"
                candidates[name] = driver.candidate(weights, scheme, copies, rows, accuracy, isa)
                sizes[name] = scheme.size
    for peer in arguments.peers:
        weight_bytes = PEERS[peer][0] * k * n
        if peer == "ort_float32" and k * n > 1 << 27:
            continue  # one such matrix is a gigabyte, and ONNX Runtime packs a copy
        copies = copies_for(weight_bytes, k, n, rows, min(arguments.rotate * 1e6, 1.2e9))
        candidates[peer] = OrtPeer(peer, k, n, rows, copies, driver.threads)
    found = measure(candidates, driver, buffer, arguments.budget)
    read = 1 / statistics.median(found["read"])
    results = []
    for name in candidates:
        seconds = statistics.median(found[name])
        results.append(
            {
                "name": name,
                "k": k,
                "n": n,
                "rows": rows,
                "threads": driver.threads,
                "us": seconds * 1e6,
                "best_us": min(found[name]) * 1e6,
                "runs": len(found[name]),
                "gflops": 2e-9 * rows * k * n / seconds,
                "read_gbs": read / 1e9,
                "of_read": sizes[name] / seconds / read if name in sizes else None,
            }
        )
    return results


def show(results: list[Any], peaks: dict[str, float]) -> None:
    """One shape as a table: microseconds, and how many times as long as ours each peer takes."""
    first = results[0]
    peak = peaks.get("amx_bf16", 0) / 1e9
    print(f"\n{first['k']} x {first['n']}, {first['rows']} rows, {first['threads']} threads", end="")
    print(f" (reads {first['read_gbs']:.1f} GB/s)")
    for result in results:
        limit = f"{result['of_read']:6.0%} of read" if result["of_read"] else " " * 14
        if peak and result["rows"] > 16 and result["name"].startswith("ours"):
            limit = f"{result['gflops'] / peak:6.0%} of AMX bf16"
        ratio = result["us"] / first["us"]
        print(f"  {result['name']:32} {result['us']:11.0f} us  best {result['best_us']:11.0f}  x{ratio:6.2f}  {limit}")
    sys.stdout.flush()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="KxN, separated by commas")
    parser.add_argument("--rows", default="1,4,16,64,256,1024")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--blocks", default="32", help="of our weights")
    parser.add_argument("--isas", default="auto", help=f"of our kernels: {', '.join(kernels.ISAS)}")
    parser.add_argument("--accuracies", default="int8", help="exact, bf16, int8")
    parser.add_argument("--peers", default=",".join(PEERS), help="none, or some of these")
    parser.add_argument("--rotate", type=float, default=560, help="megabytes of weights for up to 16 rows")
    parser.add_argument("--budget", type=float, default=3, help="seconds for each candidate")
    parser.add_argument("--out", type=Path, help="file that lines of JSON are added to")
    arguments = parser.parse_args()
    arguments.blocks = [int(block) for block in arguments.blocks.split(",")]
    arguments.isas = arguments.isas.split(",")
    arguments.accuracies = [Accuracy[name.upper()] for name in arguments.accuracies.split(",")]
    arguments.peers = [] if arguments.peers == "none" else arguments.peers.split(",")

    library, buffer = build(), touched(READ_BYTES)
    for threads in map(int, arguments.threads.split(",")):
        driver = Driver(library, threads)
        peaks = driver.peaks()
        print(f"\nlimits, {threads} threads: " + ", ".join(f"{name} {p / 1e9:.0f} G/s" for name, p in peaks.items()))
        for shape in arguments.shapes.split(","):
            k, n = map(int, shape.split("x"))
            for rows in map(int, arguments.rows.split(",")):
                results = run_case(arguments, driver, buffer, k, n, rows)
                show(results, peaks)
                if arguments.out is not None:
                    with arguments.out.open("a") as file:
                        file.writelines(json.dumps({**result, "peaks": peaks}) + "\n" for result in results)
                gc.collect()
        driver.close()


if __name__ == "__main__":
    main()
