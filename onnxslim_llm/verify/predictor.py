"""What measuring a decoder needs of it, whatever runtime it lives in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from onnxslim_llm.runtime.session import Array

__all__ = ["Limits", "Predictor"]


class Limits(Protocol):
    """How a decoder wants to be fed: `runtime.signature.DecoderSignature`, or `runtime.gguf.GgufLimits`."""

    @property
    def caches(self) -> Sequence[object]:
        """What is carried from run to run; nothing if the whole text has to be run again."""
        ...

    @property
    def length(self) -> int | None:
        """Tokens of a run, if fixed."""
        ...

    @property
    def batch(self) -> int | None:
        """Rows of a run, if fixed."""
        ...

    @property
    def last_token_only(self) -> bool:
        """Whether there are logits of the last token only."""
        ...

    @property
    def logits(self) -> str:
        """Name of the result, for messages."""
        ...


class Predictor(Protocol):
    """A decoder that is open: `runtime.decoder.DecoderRunner`, or `runtime.gguf.GgufDecoder`."""

    @property
    def signature(self) -> Limits:
        """How it wants to be fed."""
        ...

    @property
    def where(self) -> str:
        """File or label, for messages."""
        ...

    @property
    def vocab(self) -> int:
        """Number of tokens that it knows."""
        ...

    def prefill(self, ids: Array, state: Any = None) -> tuple[Array, Any]:
        """Run `ids` [B, S] after `state`: logits [B, S, V], or [B, 1, V] of the last token only, and the new state."""
        ...
