"""A decoder that runs each window of a text once and remembers its logits, for many comparisons with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.runtime.decoder import DecoderRunner, DecoderState
from onnxslim_llm.runtime.signature import DecoderSignature

Array = NDArray[Any]


@dataclass(frozen=True)
class RecordedState:
    """The tokens that were seen, and the decoder's own state if it ran them."""

    seen: bytes
    inner: DecoderState | None


class Recorded:
    """A `DecoderRunner` with a memory: rows [S, V] of logits by the tokens before them and their own."""

    def __init__(self, runner: DecoderRunner) -> None:
        self._runner = runner
        self._known: dict[bytes, Array] = {}

    @property
    def signature(self) -> DecoderSignature:
        """Of the decoder."""
        return self._runner.signature

    @property
    def where(self) -> str:
        """Of the decoder."""
        return self._runner.where

    @property
    def vocab(self) -> int:
        """Of the decoder."""
        return self._runner.vocab

    def prefill(self, ids: Array, state: RecordedState | None = None) -> tuple[Array, RecordedState]:
        """Run `ids` [B, S] after `state`, or remember what came of it."""
        before = state.seen if state else b""
        seen = before + ids.astype("<i8").tobytes()
        key = seen + len(before).to_bytes(8, "little")
        inner: DecoderState | None = None
        if key not in self._known:
            past = state.inner if state else None
            if state and past is None:
                everything = np.frombuffer(before, "<i8").reshape(ids.shape[0], -1)
                _, past = self._runner.prefill(everything)
            self._known[key], inner = self._runner.prefill(ids, past)
        return self._known[key], RecordedState(seen, inner)
