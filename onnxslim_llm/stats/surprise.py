"""Whether a text is of the kind that a decoder knows: how much it surprises the model, next to what the model expects.

On text like what it was trained on, a decoder's mean loss is about the mean entropy of its own predictions. On a text
in another language, or in tokens of another tokenizer, the loss is far above: the model is sure, and wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import Array

__all__ = ["FOREIGN_NATS", "Surprise", "measure_surprise"]

#: Loss above the entropy, in nats, from which on a text is called foreign. The sample model, which knows Python, has
#: 0.2 on held-out Python, 2.4 on English prose, 3.7 on French, 4.7 on German, 7 on its own tokens in random order.
FOREIGN_NATS = 1.0
_WINDOWS = 4


@dataclass(frozen=True)
class Surprise:
    """Means over tokens, in nats.

    Attributes:
        loss: Negative logarithm of the probability of the text's tokens.
        entropy: Of the predictions: what the loss would be if the text came from the model itself.
    """

    loss: float
    entropy: float

    @property
    def foreign(self) -> bool:
        """Whether the text is not of the model's kind."""
        return self.loss - self.entropy > FOREIGN_NATS


def measure_surprise(runner: DecoderRunner, tokens: Array, window: int) -> Surprise | None:
    """Measure a few windows of `tokens` [n], spread over all of them; None where the model gives too few logits."""
    if len(tokens) < 2 or runner.signature.last_token_only or (runner.signature.length and runner.signature.caches):
        return None
    losses, entropies = [], []
    for start in sorted({int(s) for s in np.linspace(0, max(0, len(tokens) - window), _WINDOWS)}):
        ids = tokens[start : start + window]
        logits, _ = runner.extend(np.repeat(ids[None], runner.signature.batch or 1, axis=0))
        known = _log_softmax(logits[0, : len(ids) - 1])
        losses.append(-known[np.arange(len(ids) - 1), ids[1:]])
        entropies.append(-(np.exp(known) * known).sum(axis=1))
    loss, entropy = (float(np.concatenate(parts).mean()) for parts in (losses, entropies))
    return Surprise(loss, entropy) if np.isfinite(loss) and np.isfinite(entropy) else None


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True).astype(np.float64)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
