"""llama.cpp's products, through the ggml libraries that llama-cpp-python installs.

Weights go where llama.cpp puts them when it loads a model: into the first kind of memory whose kernels take the product
(AMX, then interleaved rows, then as in the file). One graph holds a product for each copy of the weight.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ggml_library import GgmlLibrary, InitParams, installed_folder

Array = np.ndarray[Any, Any]

F32 = 0  # enum ggml_type
SPINNING = 0.03
"""Seconds in which the threads of GNU OpenMP have gone to sleep: by default they spin 300,000 times first."""


@dataclass(frozen=True)
class GgmlType:
    """A quantized type of ggml: its number, and what is repeated along K.

    Attributes:
        elements: weights of one block.
        scales: float16 numbers that lead a block.
        size: bytes of a block.
    """

    number: int
    elements: int
    scales: int
    size: int

    def random(self, k: int, n: int) -> Array:
        """Bytes of a random weight [n, k] with scales of ordinary size."""
        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 256, (n * k // self.elements, self.size), dtype=np.uint8)
        scales = (0.005 + 0.01 * rng.random((blocks.shape[0], self.scales))).astype(np.float16)
        blocks[:, : 2 * self.scales] = scales.view(np.uint8)
        return blocks.reshape(-1)


GGML_PEERS = {"llama_q4_0": GgmlType(2, 32, 1, 18), "llama_q4_k": GgmlType(12, 256, 2, 144)}


def usable_folder(folder: Path | None = None) -> Path | None:
    """Where working libraries of ggml are: `folder`, or the installed llama_cpp's; else None, and a line says why.

    Tried in a process of its own, because the AMX products of a build by GCC 12 end the process: see tile_config.h.
    """
    folder = folder or installed_folder()
    if folder is None:
        print("llama.cpp is left out: pip install llama-cpp-python, or name its libraries with --llama-cpp")
        return None
    trial = (
        "import sys; from pathlib import Path; from ggml_library import GgmlLibrary; from ggml_peers import GgmlPeer;"
        "GgmlPeer(GgmlLibrary(Path(sys.argv[1])), 'llama_q4_0', 256, 64, 64, 1, 1).seconds()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", trial, str(folder)], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines() or [
            f"status {ended.returncode}; see benchmarks/kernels/tile_config.h"
        ]
        print(f"llama.cpp is left out: a product with {folder} failed: {lines[-1]}")
        return None
    return folder


class GgmlPeer:
    """``copies`` products of the same activations, one graph.

    Attributes:
        buffer: name of the kind of memory that holds the weights, which says which kernels run.
    """

    def __init__(
        self,
        library: GgmlLibrary,
        name: str,
        k: int,
        n: int,
        rows: int,
        copies: int,
        threads: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._lib, self._type, self.copies = library, GGML_PEERS[name], copies
        self._rows, self._columns, self._threads, self._clock = rows, n, threads, clock
        self._backend = library.backend_cpu_init()
        library.backend_cpu_set_n_threads(self._backend, threads)
        nodes = 2 * copies + 16
        described = library.tensor_overhead() * nodes + library.graph_overhead_custom(nodes, False)
        self._context = library.init(InitParams(described, None, True))
        self._buffers: list[int] = []
        weights = [library.new_tensor_2d(self._context, self._type.number, k, n) for _ in range(copies)]
        x = library.new_tensor_2d(self._context, F32, k, rows)
        self._products = [library.mul_mat(self._context, weight, x) for weight in weights]
        plain = library.backend_cpu_buffer_type()
        self._place([x], plain)
        self._place(self._products, plain, shared=True)
        self.buffer = self._place_weights(weights, k, rows)
        data = self._type.random(k, n)
        for weight in weights:
            library.backend_tensor_set(weight, data.ctypes.data, 0, data.nbytes)
        values = np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32)
        library.backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
        self._graph = library.new_graph_custom(self._context, nodes, False)
        for product in self._products:
            library.build_forward_expand(self._graph, product)

    def _place(self, tensors: list[int], kind: int, *, shared: bool = False) -> None:
        """Give tensors memory, one after the other; or all the same, as an allocator does with short-lived results."""
        library = self._lib
        sizes = [-(-library.backend_buft_get_alloc_size(kind, tensor) // 64) * 64 for tensor in tensors]
        buffer = library.backend_buft_alloc_buffer(kind, max(sizes) if shared else sum(sizes))
        self._buffers.append(buffer)
        address = library.backend_buffer_get_base(buffer)
        for tensor, size in zip(tensors, sizes, strict=True):
            library.backend_tensor_alloc(buffer, tensor, address)
            address += 0 if shared else size

    def _place_weights(self, weights: list[int], k: int, rows: int) -> str:
        """Put the weights into the first kind of memory whose kernels take them."""
        library = self._lib
        device = library.backend_get_device(self._backend)
        for kind in library.weight_buffers(device):
            # Asked with a weight that lies there, and before the real ones do, because places are final.
            probe = library.new_tensor_2d(self._context, self._type.number, k, self._columns)
            product = library.mul_mat(self._context, probe, library.new_tensor_2d(self._context, F32, k, rows))
            buffers = len(self._buffers)
            self._place([probe], kind)
            taken = library.backend_dev_supports_op(device, product)
            library.backend_buffer_free(self._buffers.pop(buffers))
            if taken:
                self._place(weights, kind)
                return str(library.backend_buft_name(kind).decode())
        raise RuntimeError("ggml has no memory for this weight")

    def seconds(self) -> float:
        """Of one product."""
        elapsed = self._lib.thread.submit(self._compute).result()
        if self._threads > 1:
            time.sleep(SPINNING)
        return elapsed / self.copies

    def _compute(self) -> float:
        start = self._clock()
        status = self._lib.backend_graph_compute(self._backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml ended with status {status}")
        return self._clock() - start

    def result(self) -> Array:
        """The newest product, [rows, n] float32."""
        values = np.empty((self._rows, self._columns), np.float32)
        self._lib.backend_tensor_get(self._products[-1], values.ctypes.data, 0, values.nbytes)
        return values

    def __del__(self) -> None:
        for buffer in getattr(self, "_buffers", ()):
            self._lib.backend_buffer_free(buffer)
        if hasattr(self, "_context"):
            self._lib.free(self._context)
            self._lib.backend_free(self._backend)
