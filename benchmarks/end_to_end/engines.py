"""A decoder opened in ONNX Runtime or llama.cpp, behind the same three methods."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]

SPINNING = 0.03
"""Seconds in which the threads of GNU OpenMP have gone to sleep after a run; see benchmarks/kernels/ggml_peers.py."""


class Engine(Protocol):
    """Runs one decoder with a cache, batch 1."""

    vocab: int

    def prefill(self, ids: list[int]) -> int:
        """Run a prompt with an empty cache; the most likely next token."""

    def step(self, token: int) -> int:
        """Run one token; the most likely next one."""

    def rest(self) -> None:
        """Return when no thread spins any more."""


class OrtEngine:
    """ONNX Runtime, through the package's own runner: caches are bound in place, nothing is copied."""

    def __init__(self, model: Path, threads: int, config: dict[str, str] | None = None) -> None:
        from onnxslim_llm.runtime.decoder import DecoderRunner, DecoderState
        from onnxslim_llm.runtime.session import open_session

        spinning = {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"}
        self.session = open_session(model, threads=threads, config={**spinning, **(config or {})})
        self._runner = DecoderRunner(self.session)
        self._state: DecoderState | None = None
        self.vocab = self._runner.vocab

    def prefill(self, ids: list[int]) -> int:
        """Run a prompt with an empty cache; the most likely next token."""
        logits, self._state = self._runner.prefill(np.array([ids], np.int64))
        return int(logits[0, -1].argmax())

    def step(self, token: int) -> int:
        """Run one token; the most likely next one."""
        logits, self._state = self._runner.extend(np.array([[token]], np.int64), self._state)
        return int(logits[0, -1].argmax())

    def rest(self) -> None:
        """Threads stop at the end of a run."""


class LlamaEngine:
    """llama.cpp, through the low-level interface of llama-cpp-python, with its own defaults."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import llama_cpp

        self._lib, self._threads = llama_cpp, threads
        self._silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp refuses {model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def prefill(self, ids: list[int]) -> int:
        """Run a prompt with an empty cache; the most likely next token."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        return self._run(ids)

    def step(self, token: int) -> int:
        """Run one token; the most likely next one."""
        return self._run([token])

    def _run(self, ids: list[int]) -> int:
        tokens = (self._lib.llama_token * len(ids))(*ids)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids)))
        if status != 0:
            raise RuntimeError(f"llama.cpp ended with status {status}")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def rest(self) -> None:
        """Wait until OpenMP's threads sleep."""
        if self._threads > 1:
            time.sleep(SPINNING)
