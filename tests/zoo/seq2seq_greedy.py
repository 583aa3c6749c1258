"""Greedy text of an encoder-decoder or of one of the decoder files that Optimum splits it into."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxslim_llm.runtime.session import Array, Session

__all__ = ["generated"]


def generated(session: Session, feeds: Mapping[str, Array], tokens: int) -> Array:
    """`tokens` greedy token ids [B, tokens] that follow `feeds`, with the cache where the file has one."""
    now = dict(feeds)
    ids = next(name for name in ("decoder_input_ids", "input_ids") if name in now)
    outputs = {info.name for info in session.outputs}
    caches = {name: name.replace("past_key_values", "present") for name in now if name.startswith("past_key_values")}
    # A file may return only the part of the cache that grows.
    caches = {past: present for past, present in caches.items() if present in outputs}
    made = []
    for _ in range(tokens):
        values = session.run(now)
        token = values["logits"][:, -1].argmax(axis=-1)[:, None].astype(np.int64)
        made.append(token)
        if caches:
            now |= {past: values[present] for past, present in caches.items() if values[present].size}
            now[ids] = token
        else:
            now[ids] = np.concatenate([now[ids], token], axis=1)
    return np.concatenate(made, axis=1)
