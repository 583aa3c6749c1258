"""Run a GGUF model in llama.cpp, fed like the decoders of ONNX Runtime, so that both can be measured alike."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.runtime.session import Array

__all__ = ["GGUF_SUFFIX", "GgufDecoder", "GgufLimits", "GgufState", "load_llama_cpp", "quiet"]

GGUF_SUFFIX = ".gguf"

_FLOAT32_CACHE = 0  # ggml's type number
_NO_FLASH_ATTENTION = 0
_ERROR_LEVEL = 4  # ggml's log levels: 2 information, 3 warning, 4 error
_KEPT_MESSAGES = 8


@dataclass(frozen=True)
class GgufLimits:
    """What `runtime.signature.DecoderSignature` says of an ONNX decoder, where it matters to whoever feeds one.

    Attributes:
        caches: names of what is carried from run to run.
        length: tokens of a run, if fixed.
        batch: rows of a run.
        last_token_only: whether there are logits of the last token only.
        logits: the name of the result, for messages.
    """

    caches: tuple[str, ...] = ("kv",)
    length: int | None = None
    batch: int | None = 1
    last_token_only: bool = False
    logits: str = "logits"


@dataclass(frozen=True)
class GgufState:
    """How much of the text the decoder has seen; the cache itself stays in llama.cpp.

    Attributes:
        length: tokens.
    """

    length: int


class GgufDecoder:
    """A GGUF model with its cache, in float32 so that nothing but the weights and their kernels makes a difference.

    Only the newest state can be extended, or an earlier one of the same text: there is one cache.

    Args:
        path: the .gguf file.
        context: tokens that the cache has room for.
        threads: of llama.cpp; 0 takes half of the usable CPUs: its threads wait for each other without sleeping.

    Raises:
        UsageError: there is no such file.
        ResourceError: llama-cpp-python is not installed.
        ModelError: llama.cpp cannot load the file.
    """

    signature = GgufLimits()

    def __init__(self, path: str | Path, *, context: int = 512, threads: int = 0) -> None:
        self.where = str(path)
        if not Path(path).is_file():
            raise UsageError("there is no such GGUF file", where=self.where, todo="check the path")
        self._llama = load_llama_cpp()
        self._log = quiet(self._llama)
        self._model: Any = None
        self._context: Any = None
        self._filled = 0
        settings = self._llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = False  # repacked weights crash where the system does not grant AMX
        self._model = self._llama.llama_model_load_from_file(os.fsencode(path), settings)
        if not self._model:
            raise self._failed("llama.cpp cannot load this model")
        trained = int(self._llama.llama_model_n_ctx_train(self._model))
        self.context = min(context, trained) if trained > 0 else context
        options = self._llama.llama_context_default_params()
        options.n_ctx = options.n_batch = self.context
        options.n_threads = options.n_threads_batch = threads or max(1, len(os.sched_getaffinity(0)) // 2)
        options.type_k = options.type_v = _FLOAT32_CACHE
        options.flash_attn_type = _NO_FLASH_ATTENTION
        self._context = self._llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise self._failed("llama.cpp cannot make a context for this model")
        vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.vocab = int(self._llama.llama_vocab_n_tokens(vocabulary))

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._llama.llama_free(self._context)
        if getattr(self, "_model", None):
            self._llama.llama_model_free(self._model)

    def prefill(self, ids: Array, state: GgufState | None = None) -> tuple[Array, GgufState]:
        """Run `ids` [1, S] after `state`; None starts anew.

        Returns:
            Logits [1, S, V] float32, and the new state.

        Raises:
            UsageError: more than one row, or more tokens than `context`.
            ModelError: llama.cpp fails.
        """
        if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise UsageError(f"a GGUF model is fed one row of tokens, not {list(ids.shape)}", where=self.where)
        past = state.length if state else 0
        count = ids.shape[1]
        if past > self._filled or past + count > self.context:
            what = f"{count} tokens after {past} do not fit: {self._filled} are known, there is room for {self.context}"
            raise UsageError(what, where=self.where)
        llama = self._llama
        memory = llama.llama_get_memory(self._context)
        if past:
            llama.llama_memory_seq_rm(memory, 0, past, -1)
        else:
            llama.llama_memory_clear(memory, True)
        self._filled = past
        batch = llama.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(ids[0].tolist()):
                batch.token[i], batch.pos[i], batch.logits[i] = token, past + i, 1
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
            if llama.llama_decode(self._context, batch):
                raise self._failed("llama.cpp cannot run this model")
            size = count * self.vocab
            pointer = ctypes.cast(llama.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float * size))
            logits = np.frombuffer(pointer.contents, np.float32).reshape(1, count, self.vocab).copy()
        finally:
            llama.llama_batch_free(batch)
        self._filled = past + count
        return logits, GgufState(self._filled)

    def _failed(self, what: str) -> ModelError:
        said = "; ".join(self._log.messages)
        return ModelError(f"{what}: {said}" if said else what, where=self.where, todo="check it with llama.cpp itself")


def load_llama_cpp() -> Any:
    """Return the module `llama_cpp`.

    Raises:
        ResourceError: it is not installed, or its native library does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise ResourceError(
            f"GGUF models need llama-cpp-python: {error}", todo="pip install 'onnxslim-llm[gguf]'"
        ) from error
    return llama_cpp


class _Log:
    """Keeps llama.cpp's last errors; everything else that it would print is dropped."""

    def __init__(self, llama: Any) -> None:
        self.messages: list[str] = []
        self.callback = llama.llama_log_callback(self._take)

    def _take(self, level: int, text: bytes, _: Any) -> None:
        if level >= _ERROR_LEVEL and text.strip():
            self.messages = [*self.messages, text.decode("utf-8", "replace").strip()][-_KEPT_MESSAGES:]


_LOGS: list[_Log] = []  # llama.cpp calls back as long as the process lives


def quiet(llama: Any) -> _Log:
    """Catch what llama.cpp says; there is one log for all models."""
    if not _LOGS:
        _LOGS.append(_Log(llama))
        llama.llama_log_set(_LOGS[0].callback, None)
        llama.llama_backend_init()
    _LOGS[0].messages.clear()
    return _LOGS[0]
