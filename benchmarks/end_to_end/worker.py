"""One decoder in one process, measured on request; started by compare.py.

Reads a line of JSON from stdin and answers with one on stdout, as onnxslim_llm.runtime.bench_worker does for the models
of one runtime.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from engines import Engine, LlamaEngine, OrtEngine

CONTEXT = 1024  # tokens that llama.cpp's cache has room for
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def memory() -> dict[str, int]:
    """Bytes of this process: "anonymous" has no file behind it, "file" is mapped."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return {"anonymous": found["RssAnon"], "file": found["RssFile"]}


class Worker:
    """Opens the decoder and measures it.

    Attributes:
        loaded: "seconds" from file to a session that can run, and what memory grew by until then.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        path, threads = Path(request["model"]), int(request["threads"])
        llama = path.suffix == ".gguf"
        # The libraries themselves are not part of the model's load time or memory.
        if llama:
            import llama_cpp  # noqa: F401
        else:
            import onnxruntime  # noqa: F401

            from onnxslim_llm.runtime import decoder, session  # noqa: F401
        self._before = memory()
        start = time.perf_counter()
        self._engine: Engine = LlamaEngine(path, threads, CONTEXT) if llama else OrtEngine(path, threads)
        self.loaded = {"seconds": time.perf_counter() - start, **self._grown()}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """What opening took."""
        return self.loaded

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of a prompt of `tokens` tokens, with an empty cache and the logits of the last token."""
        ids, clock = self._ids(request["tokens"]), CLOCKS[request["clock"]]
        start = clock()
        self._engine.prefill(ids)
        seconds = clock() - start
        self._engine.rest()
        return {"seconds": seconds}

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of each of `tokens` greedy steps after a prompt of `prompt` tokens."""
        token = self._engine.prefill(self._ids(request["prompt"]))
        steps, clock = [], CLOCKS[request["clock"]]
        for _ in range(request["tokens"]):
            start = clock()
            token = self._engine.step(token)
            steps.append(clock() - start)
        self._engine.rest()
        return {"steps": steps}

    def memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """What memory has grown by since before the model was opened."""
        return self._grown()

    def _grown(self) -> dict[str, int]:
        return {key: value - self._before[key] for key, value in memory().items()}

    def _ids(self, count: int) -> list[int]:
        return [int(i) for i in np.random.default_rng(7).integers(0, self._engine.vocab, count)]


def serve() -> None:
    """Answer until stdin closes; the first request opens the model."""
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        worker = worker or Worker(request)
        answer = getattr(worker, request["verb"])(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
