"""How large the keys and values in a decoder's cache become, for the scales of an int8 cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.errors import UsageError

__all__ = ["cache_ranges"]

#: Sample texts and their length; the largest magnitudes of a channel are stable after some hundred tokens.
ROWS, LENGTH = 4, 128
_SEED = 0


def cache_ranges(source: Path, threads: int, token_ids: list[int] | None = None) -> dict[str, NDArray[Any]]:
    """Return the largest magnitudes [H, D] in each cache, by the name of the present output.

    Args:
        source: The .onnx file of the decoder, with a cache.
        threads: Of the runtime.
        token_ids: Text to run; random tokens if there is none, or too little.

    Raises:
        ModelError: The model is no decoder that can be run.
        UsageError: It has no cache, or one that is not [B, H, P, D].
    """
    from onnxslim_llm.runtime.decoder import DecoderRunner  # loads the runtime
    from onnxslim_llm.runtime.session import open_session

    runner = DecoderRunner(open_session(source, threads=threads))
    pairs = runner.signature.caches
    if not pairs or runner.signature.in_place or any(len(pair.shape) != 4 for pair in pairs):
        what = "the model has no growing KV cache [batch, heads, past, head size]"
        raise UsageError(what, where="--kv-cache int8", todo="use --kv-cache separate")
    rows = runner.signature.batch or ROWS
    length = runner.signature.length or LENGTH
    random = np.random.default_rng(_SEED).integers(0, runner.vocab, rows * length)
    text = np.array([] if token_ids is None else token_ids[: random.size], np.int64)
    ids = np.concatenate([text, random[text.size :]]).reshape(rows, length)
    _, state = runner.prefill(ids)
    ranges = {}
    for pair in pairs:
        value = runner.session.array(state.caches[pair.past]).astype(np.float32)
        ranges[pair.present] = np.abs(value).max(axis=(0, 2))
    return ranges
