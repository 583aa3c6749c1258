"""KV caches of a decoder that extends them in place: buffers that grow, and that several continuations may share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxslim_llm.runtime.session import Session
from onnxslim_llm.runtime.signature import CachePair

__all__ = ["CacheBuffers"]

#: Tokens that a new buffer has room for behind those that are written; a full one grows to the double.
_HEADROOM = 64


@dataclass
class CacheBuffers:
    """The buffers of all layers, [B, H, capacity, D] each.

    Attributes:
        values: OrtValues by the name of the past input.
        capacity: Tokens that they hold at most.
        filled: Tokens that the newest run has written. Who stands before that may read, but must not write: the
            positions behind belong to someone else.
    """

    values: dict[str, Any] = field(default_factory=dict)
    capacity: int = 0
    filled: int = 0

    def room_for(
        self, session: Session, pairs: tuple[CachePair, ...], batch: int, past: int, total: int
    ) -> CacheBuffers:
        """Return buffers whose first `past` tokens are those of these, and that may be written up to `total`.

        These buffers themselves, if they are large enough and nobody has written behind `past`; else a copy.
        """
        if self.capacity >= total and self.filled == past and self.values:
            return self
        # A prompt is rarely all: without room behind it the first token would copy the whole cache.
        capacity = max(total + _HEADROOM, 2 * self.capacity) if self.capacity < total else self.capacity
        values = {}
        for pair in pairs:
            shape = [0 if size is None else size for size in pair.shape]
            shape[pair.batch_axis], shape[pair.sequence_axis] = batch, capacity
            whole = np.zeros(shape, pair.dtype)
            if past:
                part = (slice(None),) * pair.sequence_axis + (slice(0, past),)
                whole[part] = session.array(self.values[pair.past])[part]
            values[pair.past] = session.value(whole)
        return CacheBuffers(values, capacity, past)
