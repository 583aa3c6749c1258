"""Times our products beside ONNX Runtime's and llama.cpp's, and beside what the machine can do.

    python benchmarks/kernels/bench.py --out table.jsonl                        # all of the table, 75 minutes
    python benchmarks/kernels/bench.py --shapes 2048x8192 --rows 1,16,256 --budget 0.5
    python benchmarks/kernels/bench.py --markdown table.jsonl                   # measures nothing, prints tables

Everything that is compared runs in turn within one loop, the machine's limits too; ratios are of medians. Weights are
rotated through more memory than any cache holds for up to 16 rows, and through fewer copies above, where arithmetic
decides. Peers: MatMulNBits at accuracy levels 0 and 4, blocks 32 and 128, dynamic int8, float32, and llama.cpp's Q4_0
and Q4_K where llama-cpp-python is installed. A line of JSON for each measurement goes to --out; a second call with the
same file goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Protocol

from driver import Array, Driver, build, packed_copies, touched
from ggml_library import GgmlLibrary
from ggml_peers import GGML_PEERS, GgmlPeer, usable_folder
from measurements import Measurement, append, finished, limits_of, load
from ort_peers import PEERS, OrtPeer
from tables import markdown, text

from onnxslim_llm.custom_ops import kernels
from onnxslim_llm.custom_ops.matmul_reference import Accuracy
from onnxslim_llm.custom_ops.packed import PackedScheme

SHAPES = "2048x2048,2048x8192,8192x2048,4096x4096,4096x14336,2048x128256"
READ_BYTES = 256 << 20
"""Of a reading between the products: as long as a few large ones."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
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


def measure(candidates: dict[str, Candidate], budget: float, least: int) -> dict[str, list[float]]:
    """What each candidate returns, run in turn after a warm-up; each until it has had its seconds and `least` runs."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    for candidate in candidates.values():
        candidate.seconds()
    waiting = list(candidates)
    while waiting:
        for name in waiting:
            start = time.perf_counter()
            found[name].append(candidates[name].seconds())
            spent[name] += time.perf_counter() - start
        waiting = [name for name in waiting if spent[name] < budget or len(found[name]) < least]
    return found


class Reading:
    """The machine's streaming reads: seconds per byte."""

    def __init__(self, driver: Driver, buffer: Array) -> None:
        self._driver, self._buffer = driver, buffer

    def seconds(self) -> float:
        """For one byte."""
        return self._driver.read_seconds(self._buffer) / self._buffer.size


class Peak:
    """One limit of arithmetic: seconds per operation."""

    def __init__(self, driver: Driver, index: int) -> None:
        self._driver, self._index = driver, index

    def seconds(self) -> float:
        """For one operation."""
        return 1 / self._driver.peak(self._index)


class Bench:
    """What all cells of the table share: drivers by threads, ggml if there is one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._library, self._buffer = build(), touched(READ_BYTES)
        self._drivers: dict[int, Driver] = {}
        self._ggml: GgmlLibrary | None = None
        if any(peer in GGML_PEERS for peer in arguments.peers):
            folder = usable_folder(arguments.llama_cpp)
            if folder is None:
                arguments.peers = [peer for peer in arguments.peers if peer not in GGML_PEERS]
            else:
                self._ggml = GgmlLibrary(folder)

    def driver(self, threads: int) -> Driver:
        """The driver with a pool of so many threads."""
        if threads not in self._drivers:
            self._drivers[threads] = Driver(self._library, threads, self.arguments.clock == "cpu")
        return self._drivers[threads]

    def schemes(self, k: int, n: int) -> dict[str, tuple[PackedScheme, Accuracy, str]]:
        """Our own candidates by name."""
        arguments = self.arguments
        return {
            f"ours_{accuracy.name.lower()}_b{block}_{isa}": (PackedScheme(k, n, block=block), accuracy, isa)
            for block in arguments.blocks
            for isa in arguments.isas
            for accuracy in arguments.accuracies
        }

    def peers(self, k: int, n: int) -> list[str]:
        """Peers that are measured for a shape: a float32 matrix of the largest is a gigabyte, and packed once more."""
        return [peer for peer in self.arguments.peers if peer != "ort_float32" or k * n <= 1 << 27]

    def candidates(self, k: int, n: int, rows: int, threads: int) -> dict[str, Candidate]:
        """Everything that is measured in one cell but the limits."""
        rotate = self.arguments.rotate * 1e6
        found: dict[str, Candidate] = {}
        weights: dict[PackedScheme, Array] = {}
        for name, (scheme, accuracy, isa) in self.schemes(k, n).items():
            copies = copies_for(scheme.size, k, n, rows, rotate)
            if scheme not in weights:
                weights[scheme] = packed_copies(scheme, copies)
            found[name] = self.driver(threads).candidate(weights[scheme], scheme, copies, rows, accuracy, isa)
        for peer in self.peers(k, n):
            if peer in GGML_PEERS:
                assert self._ggml is not None
                kind = GGML_PEERS[peer]
                copies = copies_for(k * n * kind.size / kind.elements, k, n, rows, rotate)
                found[peer] = GgmlPeer(self._ggml, peer, k, n, rows, copies, threads, CLOCKS[self.arguments.clock])
            else:
                copies = copies_for(PEERS[peer][0] * k * n, k, n, rows, min(rotate, 1.2e9))
                found[peer] = OrtPeer(peer, k, n, rows, copies, threads, CLOCKS[self.arguments.clock])
        return found

    def cell(self, k: int, n: int, rows: int, threads: int) -> list[Measurement]:
        """All candidates for one shape, number of rows and number of threads."""
        driver = self.driver(threads)
        candidates = self.candidates(k, n, rows, threads)
        limits: dict[str, Candidate] = {"read": Reading(driver, self._buffer)}
        limits.update({name: Peak(driver, index) for name, index in driver.peaks.items()})
        found = measure({**candidates, **limits}, self.arguments.budget, self.arguments.runs)
        per_second = {name: 1 / statistics.median(found[name]) for name in limits}
        schemes = self.schemes(k, n)
        results = []
        for name in candidates:
            seconds = statistics.median(found[name])
            limit, share = None, None
            if name in schemes:
                scheme, accuracy, isa = schemes[name]
                limit, amount = limits_of(rows, scheme.size, k, n, isa, accuracy.name.lower(), list(driver.peaks))
                share = amount / seconds / per_second[limit] if limit else None
            results.append(
                Measurement(
                    name=name,
                    k=k,
                    n=n,
                    rows=rows,
                    threads=threads,
                    us=seconds * 1e6,
                    best_us=min(found[name]) * 1e6,
                    runs=len(found[name]),
                    limit=limit,
                    of_limit=share,
                    limits={key: value / 1e9 for key, value in per_second.items()},
                    kernels=getattr(candidates[name], "buffer", None),
                )
            )
        return results

    def close(self) -> None:
        """Ends the threads."""
        for driver in self._drivers.values():
            driver.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="KxN, separated by commas")
    parser.add_argument("--rows", default="1,4,16,64,256,1024")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--blocks", default="32,128", help="of our weights")
    parser.add_argument("--isas", default="auto", help=f"of our kernels: {', '.join(kernels.ISAS)}")
    parser.add_argument("--accuracies", default="int8", help="exact, bf16, int8")
    parser.add_argument("--peers", default=",".join([*PEERS, *GGML_PEERS]), help="none, or some of these")
    parser.add_argument("--llama-cpp", type=Path, help="folder with libggml.so [default: the installed llama_cpp's]")
    parser.add_argument("--rotate", type=float, default=560, help="megabytes of weights for up to 16 rows")
    parser.add_argument("--budget", type=float, default=2, help="seconds for each candidate of a cell")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, which for one thread says more where others use the machine",
    )
    parser.add_argument("--runs", type=int, default=3, help="of each candidate, at least")
    parser.add_argument("--out", type=Path, help="file that lines of JSON are added to; cells that it has are skipped")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print tables of an --out file, and end")
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        print(markdown(load(arguments.markdown)))
        return
    if arguments.clock == "cpu" and arguments.threads != "1":
        parser.error("processor time of several threads says nothing: --threads 1")
    arguments.blocks = [int(block) for block in arguments.blocks.split(",")]
    arguments.isas = arguments.isas.split(",")
    arguments.accuracies = [Accuracy[name.upper()] for name in arguments.accuracies.split(",")]
    arguments.peers = [] if arguments.peers == "none" else arguments.peers.split(",")

    bench = Bench(arguments)
    known = load(arguments.out) if arguments.out is not None and arguments.out.exists() else []
    for threads in map(int, arguments.threads.split(",")):
        for shape in arguments.shapes.split(","):
            k, n = map(int, shape.split("x"))
            wanted = {*bench.schemes(k, n), *bench.peers(k, n)}
            for rows in map(int, arguments.rows.split(",")):
                if finished(known, k, n, rows, threads, wanted):
                    continue
                results = bench.cell(k, n, rows, threads)
                print(text(results))
                sys.stdout.flush()
                if arguments.out is not None:
                    append(arguments.out, results)
                gc.collect()
    bench.close()


if __name__ == "__main__":
    main()
