"""Inputs that exercise a model the way it will be used, fitted to its own signature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from onnxslim_llm.errors import UsageError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import Array, Session
from onnxslim_llm.runtime.signature import find_decoder
from onnxslim_llm.verify.arrays import load_arrays
from onnxslim_llm.verify.cases import SEED, STEPS, DecoderCase, TensorCase, decoder_cases, fit_length, tensor_cases

__all__ = ["Level", "Plan", "make_plan", "shorter"]

Level = Literal["fast", "full"]

_GREEDY_PROMPT = 12  # tokens of a prompt from which both models continue


@dataclass(frozen=True)
class _Effort:
    """How much a level runs: tokens of a case, repetitions with other tokens, greedy prompts and tokens."""

    length: int
    rounds: int
    prompts: int


_EFFORT: dict[Level, _Effort] = {"fast": _Effort(24, 1, 4), "full": _Effort(96, 3, 16)}


@dataclass(frozen=True)
class Plan:
    """What will be compared.

    Attributes:
        kind: "decoder" or "tensors".
        cases: in order; all of one kind.
        prompts: [N, T] int64 beginnings for greedy continuation, None for other models.
        greedy_tokens: number of tokens to continue.
        skipped: (case, reason) pairs: what this model cannot be asked.
        level: how thorough it is.
        why_not_decoder: the reason, for kind "tensors".
    """

    kind: Literal["decoder", "tensors"]
    cases: tuple[DecoderCase | TensorCase, ...]
    prompts: Array | None = None
    greedy_tokens: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    level: Level = "fast"
    why_not_decoder: str = field(default="", compare=False)


def make_plan(
    session: Session,
    *,
    proto: onnx.ModelProto | None = None,
    level: Level = "fast",
    token_ids: Sequence[int] | None = None,
    arrays: str | Path | None = None,
    greedy_tokens: int = 64,
    stepwise: bool = False,
) -> Plan:
    """Choose the inputs for a source model.

    Args:
        session: the open source model; cases that it cannot run itself are left out.
        proto: the same model, weights not needed; bounds index inputs by the tables they look up.
        level: "fast" (seconds on a small model) or "full".
        token_ids: tokens of real text for a decoder; random ones are used without.
        arrays: a .npz or .npy file, or a folder of them, with the inputs of a model that is no decoder.
        greedy_tokens: tokens of the greedy continuation.
        stepwise: steps and chunks for a decoder without a cache, too.

    Raises:
        ModelError: no inputs can be made up; the input is named.
        UsageError: the given inputs do not fit the model.
    """
    if arrays is not None:
        return Plan("tensors", tuple(load_arrays(Path(arrays), session.inputs)))
    signature, why = find_decoder(session)
    if signature is not None:
        runner = DecoderRunner(session, signature)
        if runner.is_causal():
            return _decoder_plan(runner, level, token_ids, greedy_tokens, stepwise)
        why = "its logits depend on later tokens, so it is no causal decoder"
    cases, skipped = tensor_cases(session, proto)
    return Plan("tensors", tuple(cases), skipped=tuple(skipped), why_not_decoder=why)


def shorter(plan: Plan, cases: int) -> Plan:
    """Return the first cases of a plan, without greedy continuation, for runtimes that take seconds for a run."""
    left_out = (("greedy continuation", "the runtime here is a simulator"),) if plan.prompts is not None else ()
    skipped = (*plan.skipped, *left_out)
    return replace(plan, cases=plan.cases[:cases], prompts=None, greedy_tokens=0, skipped=skipped)


def _decoder_plan(
    runner: DecoderRunner, level: Level, token_ids: Sequence[int] | None, greedy_tokens: int, stepwise: bool
) -> Plan:
    signature, effort = runner.signature, _EFFORT[level]
    source = _tokens(runner.vocab, token_ids)
    cases: list[DecoderCase] = []
    skipped: list[tuple[str, str]] = []
    for number in range(effort.rounds):
        made, left_out = decoder_cases(signature, source, effort.length, stepwise=stepwise)
        suffix = f" #{number + 1}" if effort.rounds > 1 else ""
        cases += [DecoderCase(case.name + suffix, case.pieces) for case in made]
        skipped = left_out
    prompts = None
    if signature.caches or signature.length is None or signature.length >= _GREEDY_PROMPT + greedy_tokens:
        shape = (effort.prompts, fit_length(signature, _GREEDY_PROMPT))
        prompts = np.stack([next(source)[: shape[1]] for _ in range(shape[0])])
    else:
        skipped = [*skipped, ("greedy continuation", f"the model runs at most {signature.length} tokens")]
    return Plan("decoder", tuple(cases), prompts, greedy_tokens, tuple(skipped), level)


def _tokens(vocab: int, token_ids: Sequence[int] | None) -> Iterator[Array]:
    """Endless rows of at least as many tokens as any case needs: slices of the text, or random ids."""
    rng = np.random.default_rng(SEED)
    longest = max(effort.length for effort in _EFFORT.values()) + STEPS
    if token_ids is not None and len(token_ids) == 0:
        raise UsageError("the calibration text has no tokens")
    text = None if token_ids is None else np.asarray(token_ids, np.int64)
    if text is not None and (text.min() < 0 or text.max() >= vocab):
        raise UsageError(
            f"the text has the token id {int(text.max())}, the model's vocabulary has {vocab}",
            todo="use the tokenizer that belongs to the model",
        )
    if text is not None and len(text) < longest:
        text = np.resize(text, longest)
    while True:
        if text is None:
            yield rng.integers(0, vocab, longest)
        else:
            start = int(rng.integers(0, len(text) - longest + 1))
            yield text[start : start + longest]
