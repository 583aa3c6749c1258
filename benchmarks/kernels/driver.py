"""Builds and binds driver.cpp: our kernels and the machine's limits, timed without Python in between."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_llm.custom_ops import kernels
from onnxslim_llm.custom_ops.packed import PackedScheme

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "kernel-bench"
PAGE = 4096

Array = np.ndarray[Any, Any]


def build() -> Path:
    """Compiles the driver with the kernels as they are in the checkout."""
    source = str(ROOT / "custom_ops")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DONNXSLIM_LLM_BENCHMARKS=ON"]
    subprocess.run(["cmake", "-S", source, "-B", str(BUILD), *options], check=True, stdout=subprocess.DEVNULL)
    target = ["--target", "onnxslim_llm_kernel_bench", "--parallel", "2"]
    subprocess.run(["cmake", "--build", str(BUILD), *target], check=True, stdout=subprocess.DEVNULL)
    return next(BUILD.glob("libonnxslim_llm_kernel_bench.*"))


def touched(size: int) -> Array:
    """Memory at a page boundary, mapped."""
    memory = np.empty(size + PAGE, np.uint8)
    memory[::PAGE] = 0
    start = -memory.ctypes.data % PAGE
    return memory[start : start + size]


class Driver:
    """The loaded driver with a pool of threads."""

    def __init__(self, library: Path, threads: int, processor_time: bool = False) -> None:
        self.threads = threads
        c = ctypes
        lib = self._lib = c.CDLL(str(library))
        lib.bench_processor_time.argtypes = (c.c_int32,)
        lib.bench_pool.restype = c.c_void_p
        lib.bench_free_pool.argtypes = (c.c_void_p,)
        integers = (c.c_int64, c.c_int64, c.c_int64)
        lib.bench_matmul.restype = c.c_double
        lib.bench_matmul.argtypes = (
            *(c.c_void_p, c.c_void_p, *integers, c.c_void_p, c.c_void_p, c.c_int64),
            *(c.c_int32, c.c_int32, c.c_int32, c.c_void_p, c.c_int64),
        )
        lib.bench_scratch_bytes.restype = c.c_int64
        lib.bench_scratch_bytes.argtypes = (c.c_void_p, c.c_int64, c.c_int64, c.c_int32, c.c_int32, c.c_int32)
        lib.bench_peak_name.restype = c.c_char_p
        lib.bench_peak.restype = c.c_double
        lib.bench_peak.argtypes = (c.c_void_p, c.c_int32, c.c_int32)
        lib.bench_read.restype = c.c_double
        lib.bench_read.argtypes = (c.c_void_p, c.c_int32, c.c_void_p, c.c_int64)
        lib.bench_processor_time(processor_time)
        self._pool = lib.bench_pool(threads)

    def close(self) -> None:
        """Ends the threads."""
        self._lib.bench_free_pool(self._pool)

    def read_seconds(self, buffer: Array) -> float:
        """Seconds to read all of a buffer once."""
        return float(self._lib.bench_read(self._pool, self.threads, buffer.ctypes.data, buffer.size))

    def peak(self, index: int) -> float:
        """Operations per second of one limit, on all threads."""
        return float(self._lib.bench_peak(self._pool, self.threads, index))

    @cached_property
    def peaks(self) -> dict[str, int]:
        """Numbers of the limits that this machine has, by name."""
        found: dict[str, int] = {}
        index = 0
        while name := self._lib.bench_peak_name(index):
            if self.peak(index) > 0:
                found[name.decode()] = index
            index += 1
        return found

    def candidate(self, weights: Array, scheme: PackedScheme, copies: int, rows: int, accuracy: int, isa: str) -> Ours:
        """Our kernels over ``copies`` weights that lie one after the other, each from a multiple of 64 bytes on."""
        return Ours(self, weights, scheme, copies, rows, accuracy, isa)


class Ours:
    """One configuration of our kernels."""

    def __init__(
        self, driver: Driver, weights: Array, scheme: PackedScheme, copies: int, rows: int, accuracy: int, isa: str
    ) -> None:
        self.driver, self.weights, self.scheme, self.copies, self.rows = driver, weights, scheme, copies, rows
        self.accuracy, self.isa = accuracy, kernels.ISAS.index(isa)
        self.a = np.random.default_rng(0).standard_normal((rows, scheme.rows)).astype(np.float32)
        self.y = touched(rows * scheme.columns * 4)
        lib, address = driver._lib, weights.ctypes.data
        needed = lib.bench_scratch_bytes(address, scheme.size, rows, accuracy, self.isa, driver.threads)
        self.scratch = touched(max(PAGE, needed))

    def seconds(self) -> float:
        """Of one product, from a pass over all copies."""
        step = -(-self.scheme.size // 64) * 64
        total = self.driver._lib.bench_matmul(
            *(self.driver._pool, self.weights.ctypes.data, self.scheme.size, step, self.copies),
            *(self.a.ctypes.data, self.y.ctypes.data, self.rows, self.accuracy, self.isa, self.driver.threads),
            *(self.scratch.ctypes.data, self.scratch.size),
        )
        if total < 0:
            raise RuntimeError("the kernels refused the benchmark's arguments")
        return float(total) / self.copies


def packed_copies(scheme: PackedScheme, copies: int) -> Array:
    """Random weights, the same one ``copies`` times."""
    rng = np.random.default_rng(0)
    blocks = -(-scheme.rows // scheme.block)
    codes = rng.integers(0, 256, (scheme.columns, blocks, scheme.block // 2), dtype=np.uint8)
    scales = (0.005 + 0.01 * rng.random((scheme.columns, blocks))).astype(np.float16)
    weight = kernels.pack(scheme, codes, scales, None)
    step = -(-weight.size // 64) * 64
    memory = touched(step * copies)
    for i in range(copies):
        memory[i * step : i * step + weight.size] = weight
    return memory
