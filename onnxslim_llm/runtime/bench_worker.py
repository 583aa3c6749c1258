"""One model in one process, measured on request; started by `runtime.bench`.

Reads one JSON request a line from stdin and answers each with one JSON line on stdout. A process of its own makes load
time and peak memory those of this model alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_llm.errors import ResourceError, SlimError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.feeds import random_feeds, sizes_of
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.runtime.signature import find_decoder

__all__ = ["peak_rss", "serve"]

_SEED = 7


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux's VmHWM belongs to this program alone; ru_maxrss would start with what the parent had before exec.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Worker:
    def __init__(self, request: dict[str, Any]) -> None:
        import onnxruntime  # noqa: F401  # loading the library is not the model's load time

        start = time.perf_counter()
        # Measured as ONNX Runtime comes, with threads that spin; but not while a worker waits for its turn.
        idle = {"session.force_spinning_stop": "1", "session.intra_op.allow_spinning": "1"}
        config = {**idle, **request["config"]}
        self.session: Session = open_session(request["model"], threads=request["threads"], config=config)
        self.load_seconds = time.perf_counter() - start
        signature, why = find_decoder(self.session)
        self.why = why
        self.runner = DecoderRunner(self.session, signature) if signature else None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": self.load_seconds, "decoder": self.runner is not None, "why": self.why}

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of one run over `tokens` tokens with an empty cache."""
        runner = self._decoder()
        ids = self._ids(request["tokens"])
        start = time.perf_counter()
        runner.prefill(ids)
        return {"seconds": time.perf_counter() - start, "tokens": ids.shape[1]}

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of `tokens` single greedy steps after a prompt of `prompt` tokens, the prompt not counted."""
        runner = self._decoder()
        logits, state = runner.prefill(self._ids(request["prompt"]))
        start = time.perf_counter()
        for _ in range(request["tokens"]):
            logits, state = runner.extend(logits[:, -1].argmax(axis=-1)[:, None], state)
        return {"seconds": time.perf_counter() - start, "tokens": request["tokens"]}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of one run of a model that is no decoder, on random inputs."""
        sizes = sizes_of(self.session.inputs, batch=1, length=request["length"])
        rng = np.random.default_rng(_SEED)
        feeds = random_feeds(self.session.inputs, sizes, rng, length=request["length"])
        start = time.perf_counter()
        self.session.run(feeds)
        return {"seconds": time.perf_counter() - start, "tokens": 0}

    def memory(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"bytes": peak_rss()}

    def _decoder(self) -> DecoderRunner:
        if self.runner is None:
            raise ResourceError(f"not a decoder: {self.why}")
        return self.runner

    def _ids(self, count: int) -> Any:
        runner = self._decoder()
        return np.random.default_rng(_SEED).integers(0, runner.vocab, (runner.signature.batch or 1, count))


def serve() -> None:
    """Answer requests until stdin closes. The first one opens the model."""
    worker: _Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or _Worker(request)
            verb: Callable[[dict[str, Any]], dict[str, Any]] = getattr(worker, request["verb"])
            answer = verb(request)
        except SlimError as error:
            kind = type(error).__name__
            answer = {"error": kind, "what": error.what, "where": error.where, "todo": error.todo}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
