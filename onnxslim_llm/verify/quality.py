"""How well a decoder predicts real text, alone and next to its source.

Perplexity over overlapping windows, and the statistics of the difference that llama.cpp made customary: KL divergence
of every token, agreement of the likeliest token, and the change of the true token's probability. Both models run in
step, a few rows of logits at a time; logits are never kept.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.gguf import GGUF_SUFFIX, GgufDecoder
from onnxslim_llm.runtime.session import Array, Session, open_session
from onnxslim_llm.runtime.sidefiles import SideFiles
from onnxslim_llm.verify.compare import Progress
from onnxslim_llm.verify.greedy import GreedyMatch, greedy_match
from onnxslim_llm.verify.predictor import Predictor
from onnxslim_llm.verify.quality_figures import Difference, Quality, TokenSums
from onnxslim_llm.verify.text import Encoder, read_tokens
from onnxslim_llm.verify.vocabulary import CommonTokens

__all__ = ["Difference", "Quality", "evaluate", "evaluate_tokens"]

_LOGIT_BYTES = 32 << 20  # logits of one model held at a time
_GREEDY_PROMPTS, _GREEDY_PROMPT, _GREEDY_TOKENS = 16, 32, 64


def evaluate(
    model: str | Path | Session,
    text: str | Path,
    tokenizer: Encoder,
    *,
    versus: str | Path | Session | None = None,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Quality:
    """Measure `model` on a text file, and its difference from `versus` on the same tokens.

    Args:
        model: decoder, as a file (.onnx or .gguf) or an open session.
        text: UTF-8 file.
        tokenizer: that the model was trained with.
        versus: the source that `model` was made from.
        window: tokens that a prediction can look back on at most; less where the model's own limit is lower.
        stride: tokens between the starts of two windows, half a window by default; only tokens that no earlier window
            predicted are counted, so a smaller stride gives every token more context.
        max_tokens: stop after this many tokens of the text.
        threads: of the runtime; 0 leaves it to the runtime.
        progress: called with (done, of how many) tokens.

    Raises:
        UsageError: the text has fewer than two tokens, or window and stride make no sense.
        ModelError: a model is no decoder, its vocabulary does not fit, or its logits are not finite.
        ResourceError: the text cannot be read, or llama-cpp-python is needed and not installed.
    """
    ids = read_tokens(Path(text), tokenizer, max_tokens)
    text_bytes = len(tokenizer.decode(ids.tolist()).encode("utf-8"))
    return evaluate_tokens(
        model, ids, versus=versus, window=window, stride=stride, threads=threads, progress=progress, size=text_bytes
    )


def evaluate_tokens(
    model: str | Path | Session | Predictor,
    ids: Array,
    *,
    versus: str | Path | Session | Predictor | None = None,
    window: int = 512,
    stride: int | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    size: int | None = None,
    greedy: bool = True,
) -> Quality:
    """As `evaluate`, on token ids [n] of a text of `size` bytes; `greedy` compares continuations, too."""
    start = time.perf_counter()
    runner = _runner(model, threads, window)
    source = None if versus is None else _runner(versus, threads, window)
    for each in (runner, source):
        if each is not None and int(ids.max()) >= each.vocab:
            raise ModelError(
                f"the text has the token id {int(ids.max())}, the model's vocabulary has {each.vocab}",
                where=each.where,
                todo="use the tokenizer that belongs to the model",
            )
    if source is not None and source.vocab != runner.vocab:
        raise ModelError(f"vocabularies differ: {source.vocab} and {runner.vocab}", where=runner.where)
    window = min(window, *(_longest(each, window) for each in (runner, source) if each is not None))
    stride = max(1, window // 2) if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise UsageError(f"window {window} and stride {stride}: the window needs 2 tokens, the stride 1 to the window")
    sums, common, left_out = TokenSums(), CommonTokens.of(source, runner), 0
    for done, expected, targets, logits in _predictions(runner, source, ids, window, stride):
        known, (mine, theirs) = common.predicted(targets, logits, expected)
        left_out += len(targets) - len(known)
        if mine is not None and len(known):
            sums.add(mine, theirs, known)
        if progress:
            progress(done, len(ids))
    if not sums.tokens:
        raise UsageError("the model has left out every token of the text", where=runner.where)
    difference = None
    if source is not None:
        difference = sums.difference(_greedy(source, runner, ids) if greedy else None)
    return Quality(
        tokens=sums.tokens,
        text_tokens=len(ids),
        token_sha256=hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
        window=window,
        stride=stride,
        ppl=math.exp(sums.nll),
        bits_per_byte=None if size is None or left_out else sums.nll / math.log(2) * len(ids) / max(1, size),
        seconds=time.perf_counter() - start,
        difference=difference,
        left_out=left_out,
    )


def _runner(model: str | Path | Session | Predictor, threads: int, window: int) -> Predictor:
    if not isinstance(model, str | Path | Session):
        return model
    if not isinstance(model, Session) and Path(model).suffix == GGUF_SUFFIX:
        return GgufDecoder(model, context=max(window, _GREEDY_PROMPT + _GREEDY_TOKENS), threads=threads)
    runner = DecoderRunner(model if isinstance(model, Session) else open_session(model, threads=threads))
    if runner.signature.last_token_only and not runner.signature.caches:
        raise ModelError(
            "the model gives logits of the last token only and has no cache, so a text would take one run a token",
            where=runner.where,
        )
    return runner


def _longest(runner: Predictor, window: int) -> int:
    """The largest window up to `window` that the model itself and the files beside it allow."""
    if isinstance(runner, GgufDecoder):
        return min(runner.context, window)
    file = Path(runner.where)
    context = SideFiles.of(file.parent).context_length if file.is_file() else None
    fixed = None if runner.signature.caches else runner.signature.length
    return min(limit for limit in (window, context, fixed) if limit is not None)


def _predictions(
    runner: Predictor, source: Predictor | None, ids: Array, window: int, stride: int
) -> Iterator[tuple[int, Array | None, Array, Array]]:
    """Yield (tokens done, source logits [n, V], targets [n], model logits [n, V]) of the tokens that count."""
    known = 1  # tokens before this one need no prediction; the first one has nothing to be predicted from
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        states: dict[Predictor, Any] = {}
        step = _rows(runner, source, end - 1 - begin)
        for at in range(begin, end - 1, step):
            stop = min(at + step, end - 1)
            fresh = max(at, known - 1)  # the logits at position i predict token i + 1
            parts: dict[Predictor, Array] = {}
            for each in (runner, source):
                if each is not None:
                    logits, states[each] = each.prefill(_batch(each, ids[at:stop]), states.get(each))
                    parts[each] = logits[0, fresh - at :] if fresh < stop else logits[0, :0]
            if fresh < stop:
                for each, part in parts.items():
                    if not np.isfinite(part).all():
                        raise ModelError("the logits are not finite", where=each.where)
                yield stop + 1, parts[source] if source else None, ids[fresh + 1 : stop + 1], parts[runner]
        known = end
        if end == len(ids):
            return


def _batch(runner: Predictor, ids: Array) -> Array:
    return np.repeat(ids[None], runner.signature.batch or 1, axis=0)


def _rows(runner: Predictor, source: Predictor | None, count: int) -> int:
    """Tokens to run at once: all without a cache, one where only the last token has logits, else a bounded number."""
    signatures = [each.signature for each in (runner, source) if each is not None]
    if any(not signature.caches for signature in signatures):
        return max(1, count)
    if any(signature.last_token_only or signature.length for signature in signatures):
        return 1
    return max(1, _LOGIT_BYTES // (4 * runner.vocab))


def _greedy(source: Predictor, runner: Predictor, ids: Array) -> GreedyMatch | None:
    count = min(_GREEDY_PROMPTS, len(ids) // _GREEDY_PROMPT)
    fixed = [each.signature.length for each in (source, runner) if each.signature.length]
    if not count or any(length < _GREEDY_PROMPT + _GREEDY_TOKENS for length in fixed):
        return None
    starts = np.linspace(0, len(ids) - _GREEDY_PROMPT, count).astype(int)
    prompts = np.stack([ids[start : start + _GREEDY_PROMPT] for start in starts])
    return greedy_match(source, runner, prompts, _GREEDY_TOKENS, tie_margin=0.0)
