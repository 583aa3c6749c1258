"""Binds the few functions of ggml that a product of one weight needs, from the libraries in an installed llama_cpp."""

from __future__ import annotations

import ctypes
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

LIBRARIES = ("libggml-base.so", "libggml-cpu.so", "libggml.so")


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class InitParams(ctypes.Structure):
    """struct ggml_init_params: where tensors' descriptions live."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ggml_init": (c_void_p, (InitParams,)),
    "ggml_log_set": (None, (LogCallback, c_void_p)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_free": (None, (c_void_p,)),
    "ggml_backend_get_device": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buft_get_alloc_size": (c_size_t, (c_void_p, c_void_p)),
    "ggml_backend_buffer_get_base": (c_void_p, (c_void_p,)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
}
"""Result and arguments; all from ggml's public headers."""


def installed_folder() -> Path | None:
    """Where an installed llama_cpp keeps its libraries; None without one."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    return folder if all((folder / name).is_file() for name in LIBRARIES) else None


class GgmlLibrary:
    """The loaded libraries; every function of `SIGNATURES` is an attribute without its prefix.

    Attributes:
        thread: where graphs must be computed.

    Args:
        folder: with libggml-base, libggml-cpu and libggml.

    Raises:
        OSError: a library cannot be loaded.
        AttributeError: this release of ggml lacks a function.
    """

    def __init__(self, folder: Path) -> None:
        loaded = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
        for name, (result, arguments) in SIGNATURES.items():
            owner = next((library for library in loaded if hasattr(library, name)), None)
            if owner is None:
                raise AttributeError(f"{folder} has no {name}")
            function = getattr(owner, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        # ggml configures AMX once per thread and trusts that nobody else does. Other candidates do, so it has its own.
        self.thread = ThreadPoolExecutor(1)
        self._silent = LogCallback(lambda _level, _text, _data: None)  # a line for each weight otherwise
        self.log_set(self._silent, None)

    def weight_buffers(self, device: int) -> list[int]:
        """Kinds of memory for weights, in the order in which llama.cpp tries them; the first ones rearrange."""
        registry = self.backend_dev_backend_reg(device)
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        kinds: list[int] = []
        if address:
            listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
            while listed and (kind := listed[len(kinds)]):
                kinds.append(kind)
        return [*kinds, self.backend_cpu_buffer_type()]

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:
        """For type checkers: functions are attributes of the instance."""
        raise AttributeError(name)
