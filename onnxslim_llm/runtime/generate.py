"""Generate token ids from a decoder: greedy or sampled, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import Array
from onnxslim_llm.runtime.static_pair import StaticPair

__all__ = ["Sampling", "generate", "pick"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: only the k likeliest tokens; 0 means all.
        top_p: only the likeliest tokens that together reach this probability (nucleus sampling, Holtzman et al. 2020).
        seed: of the random choice; the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"top-k must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, not {self.top_p}")


def generate(
    runner: DecoderRunner | StaticPair,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos: Collection[int] = (),
    context_length: int | None = None,
    chunk: int | None = None,
) -> Iterator[int]:
    """Yield new token ids until an end token (not yielded), `max_new_tokens` or a full context.

    Args:
        runner: the decoder.
        prompt: token ids, at least one.
        max_new_tokens: largest number of tokens to yield.
        sampling: how tokens are chosen; greedy by default.
        eos: ids that end the text.
        context_length: largest number of tokens of prompt and continuation, None if not limited.
        chunk: tokens of the prompt that run at once; bounds the memory of long prompts.

    Raises:
        UsageError: the prompt is empty, or does not fit the context.
        ModelError: the logits are not finite, or the model fails.
    """
    sampling = sampling or Sampling()
    if isinstance(runner, StaticPair):
        context_length = min(context_length or runner.context_length, runner.context_length)
    if not prompt:
        raise UsageError("the prompt has no tokens", todo="give a prompt with at least one token")
    if context_length is not None and len(prompt) >= context_length:
        raise UsageError(f"the prompt has {len(prompt)} tokens, the model's context holds {context_length}")
    return _tokens(runner, list(prompt), max_new_tokens, sampling, frozenset(eos), context_length, chunk)


def _tokens(
    runner: DecoderRunner | StaticPair,
    prompt: list[int],
    limit: int,
    sampling: Sampling,
    eos: frozenset[int],
    context_length: int | None,
    chunk: int | None,
) -> Iterator[int]:
    if context_length is not None:
        limit = min(limit, context_length - len(prompt))
    rng = np.random.default_rng(sampling.seed)
    fed = np.array([prompt], np.int64)
    state: Any = None  # the runner's own
    for _ in range(limit):
        logits, state = runner.prefill(fed, state, chunk=chunk)
        last = logits[0, -1].astype(np.float64)
        if not np.isfinite(last).all():
            raise ModelError("the logits are not finite", where=runner.signature.logits)
        token = pick(last, sampling, rng)
        if token in eos:
            return
        yield token
        fed = np.array([[token]], np.int64)


def pick(logits: Array, sampling: Sampling, rng: np.random.Generator) -> int:
    """Choose a token from float64 logits [V]; on a tie the lowest id wins."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = (logits[order] - logits[order[0]]) / sampling.temperature
    weights = np.exp(scaled)
    weights /= weights.sum()
    if sampling.top_p < 1:
        # The token that reaches the limit belongs to the nucleus.
        kept = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
    return int(rng.choice(order, p=weights))
