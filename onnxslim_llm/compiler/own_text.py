"""Text that a model writes itself: what its weights are fitted to where nobody gave a better one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxslim_llm.ir.model import open_model
from onnxslim_llm.stats.taps import find_taps

if TYPE_CHECKING:
    from onnxslim_llm.runtime.decoder import DecoderRunner

__all__ = ["OWN_WINDOW", "Progress", "Tokens", "own_text", "token_count", "written_by"]

Progress = Callable[[int, int], None]
Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]

#: Tokens of a sample. Every one costs a step, which writes one for many rows at once, so samples are shorter than those
#: of a user's text. They serve as well as 512 do: mean KL 0.0263 and 0.0262 for 4.5 bits of the sample model.
OWN_WINDOW = 128
_MOST_ROWS, _FEWEST_ROWS = 128, 32
#: Tokens: so many for a channel of the widest product, but no fewer and no more than these. Models of 0.26 and 1 M
#: parameters with 172 and 352 channels lose as much by 4.5 bits fitted to 4,096 tokens as to 16,384 (mean KL 0.1002 and
#: 0.0996; 0.0161 and 0.0166), the sample model with 768 a little more by 12,288 (0.0243 and 0.0240).
TOKENS_PER_CHANNEL = 24
FEWEST_TOKENS, MOST_TOKENS = 4096, 16_384
#: From this size of the weights on, a step takes a second or so: then the fewest.
_LARGE_BYTES = 1 << 30


def token_count(source: Path) -> int:
    """Return how many tokens the model in the .onnx file `source` should write."""
    model = open_model(source)
    widest = max((tap.size for tap in find_taps(model.to_proto("omit").graph)), default=0)
    most = FEWEST_TOKENS if model.weight_bytes() > _LARGE_BYTES else MOST_TOKENS
    return min(max(TOKENS_PER_CHANNEL * widest, FEWEST_TOKENS), most)


def own_text(runner: DecoderRunner, window: int, total: int, file: Path, progress: Progress) -> Tokens:
    """Return `total` tokens that the model writes; an interrupted compile that goes on finds them in `file`.

    Args:
        runner: The model.
        window: Tokens of a sample.
        total: How many to write, all samples together.
        file: .npy, named for the model; its folder is made if it does not exist.
        progress: Called with (done, of how many) tokens.
    """
    if file.is_file():
        found: Tokens = np.load(file)
        return found
    written = written_by(runner, window, total, progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".part.npy")
    np.save(temporary, written)
    os.replace(temporary, file)
    return written


def written_by(
    runner: DecoderRunner, window: int, total: int = MOST_TOKENS, progress: Progress | None = None
) -> Tokens:
    """Return token ids sampled from the model itself, many rows at once, each from a random first token.

    Args:
        runner: The model.
        window: Tokens of a row.
        total: How many tokens to write; the rows of a batch are always finished.
        progress: Called with (done, of how many) tokens.
    """
    rng = np.random.default_rng(0)
    fixed = runner.signature.batch
    rows = fixed or min(_MOST_ROWS, max(_FEWEST_ROWS, total // window))
    written = []
    batches = max(1, total // (rows * window))
    for batch in range(batches):
        ids = rng.integers(0, runner.vocab, (rows, 1))
        logits, state = runner.extend(ids)
        for _ in range(window - 1):
            last = logits[:, -1].astype(np.float64)
            # The largest of logits with Gumbel noise is a sample of their softmax.
            chosen = np.argmax(last + rng.gumbel(size=last.shape), axis=-1)[:, None]
            ids = np.concatenate([ids, chosen], axis=1)
            logits, state = runner.extend(chosen, state)
            if progress:
                progress((batch * window + ids.shape[1]) * rows, batches * window * rows)
        written.append(ids)
    return np.concatenate(written).reshape(-1).astype(np.int64)
