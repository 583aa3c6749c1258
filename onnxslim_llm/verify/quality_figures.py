"""The figures of a model on a text, and the sums that they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim_llm.runtime.session import Array
from onnxslim_llm.verify.figures import kl_divergence, log_softmax
from onnxslim_llm.verify.greedy import GreedyMatch

__all__ = ["Difference", "Quality", "TokenSums"]


@dataclass(frozen=True)
class Difference:
    """A model next to its source on the same tokens.

    Attributes:
        ppl_source: perplexity of the source; `ppl_ratio`: the model's divided by it.
        kld_mean, kld_p99, kld_max: KL(source || model) over tokens, in nats.
        top1_agreement: share of tokens where both find the same token the likeliest.
        rms_delta_p: root mean square change of the true token's probability.
        greedy: continuations of prompts from the text, None if it is too short for them or they were not asked for.
    """

    ppl_source: float
    ppl_ratio: float
    kld_mean: float
    kld_p99: float
    kld_max: float
    top1_agreement: float
    rms_delta_p: float
    greedy: GreedyMatch | None


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text.

    Attributes:
        tokens: number of predicted tokens; `read_tokens` of the text were used.
        token_sha256: of all tokens as little-endian int32: equal hashes mean comparable figures.
        window, stride: tokens of a window, and between the starts of two.
        ppl: exp(mean negative log likelihood).
        bits_per_byte: of the text in UTF-8, so it compares across tokenizers; None if only tokens were given.
        difference: next to the source, if there is one.
        left_out: tokens that the model does not know any more. They count nowhere: all figures are of the others, with
            both models' probabilities renormalised over them.
    """

    tokens: int
    text_tokens: int
    token_sha256: str
    window: int
    stride: int
    ppl: float
    bits_per_byte: float | None
    seconds: float
    difference: Difference | None = None
    left_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """The manifest's `quality` object."""
        result: dict[str, Any] = {
            "tokens": self.tokens,
            "text_tokens": self.text_tokens,
            "token_sha256": self.token_sha256,
            "window": self.window,
            "stride": self.stride,
            "ppl_artifact": self.ppl,
            "bits_per_byte": self.bits_per_byte,
            "seconds": self.seconds,
        }
        if self.left_out:
            result["tokens_left_out"] = self.left_out
        if self.difference is not None:
            other = self.difference
            result |= {
                "ppl_source": other.ppl_source,
                "ppl_ratio": other.ppl_ratio,
                "kld_mean": other.kld_mean,
                "kld_p99": other.kld_p99,
                "kld_max": other.kld_max,
                "top1_agreement": other.top1_agreement,
                "rms_delta_p": other.rms_delta_p,
            }
            if other.greedy is not None:
                result["greedy_first_divergence"] = list(other.greedy.first_divergence)
                result["greedy_prefix_match"] = other.greedy.prefix_match
        return result


class TokenSums:
    """Per-token figures; 8 bytes a token and figure, never logits."""

    def __init__(self) -> None:
        self._nll: list[Array] = []
        self._source_nll: list[Array] = []
        self._kl: list[Array] = []
        self._agree = self.tokens = 0

    def add(self, logits: Array, expected: Array | None, targets: Array) -> None:
        """Take in the logits [n, V] of a model and of its source, if there is one, and the tokens [n] that came."""
        self._nll.append(_nll(logits, targets))
        self.tokens += len(targets)
        if expected is not None:
            self._source_nll.append(_nll(expected, targets))
            self._kl.append(kl_divergence(expected, logits))
            self._agree += int((expected.argmax(axis=1) == logits.argmax(axis=1)).sum())

    @property
    def nll(self) -> float:
        """Mean negative log likelihood, in nats a token."""
        return float(np.concatenate(self._nll).mean())

    def difference(self, greedy: GreedyMatch | None) -> Difference:
        """The model next to its source."""
        ours, theirs, kl = (np.concatenate(x) for x in (self._nll, self._source_nll, self._kl))
        return Difference(
            ppl_source=math.exp(float(theirs.mean())),
            ppl_ratio=math.exp(float(ours.mean() - theirs.mean())),
            kld_mean=float(kl.mean()),
            kld_p99=float(np.quantile(kl, 0.99)),
            kld_max=float(kl.max()),
            top1_agreement=self._agree / self.tokens,
            rms_delta_p=float(np.sqrt(np.mean((np.exp(-ours) - np.exp(-theirs)) ** 2))),
            greedy=greedy,
        )


def _nll(logits: Array, targets: Array) -> Array:
    result: Array = -np.take_along_axis(log_softmax(logits), targets[:, None], axis=1)[:, 0]
    return result
