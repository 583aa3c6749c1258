"""Does a pair of graphs write what the source writes: the prompt through one, every further token through the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.artifact.manifest import Gate, Generation
from onnxslim_llm.verify.gates import default_gates

if TYPE_CHECKING:
    from onnxslim_llm.compiler.graphs import GraphPlan
    from onnxslim_llm.recipe import Recipe
    from onnxslim_llm.targets import Target
    from onnxslim_llm.verify.predictor import Predictor

__all__ = ["PAIR_GATE", "check_pair", "compare_texts"]

#: Tokens that are written after the prompt; in a simulator a step takes a second.
STEPS, SIMULATED_STEPS = 32, 8
PAIR_GATE = "pair_kl_mean"
#: The limits of `default_gates` are means over hundreds of tokens. Of a dozen the mean may be some times larger, and a
#: mistake (positions, masks, the order of the cache) makes it hundreds of times larger.
_FEW_TOKENS = 4.0
_LOSSLESS_KL = 1e-3
_SEED = 0


@dataclass(frozen=True)
class _Texts:
    top1: float
    kl: float
    same: int


def check_pair(
    source: Path,
    plans: Sequence[GraphPlan],
    directory: Path,
    target: Target,
    recipe: Recipe,
    tokens: NDArray[np.int64] | None,
    threads: int,
) -> tuple[Generation, Gate]:
    """Let source and pair go on from a prompt, both fed the source's choices.

    Args:
        source: The .onnx file, with its sizes not fixed.
        plans: Of the graph of prompts and that of steps.
        directory: Where the artifact lies.
        target: Opens its graphs.
        recipe: Says which limit the divergence has.
        tokens: Of real text; None: random ones.
        threads: Of the runtime.

    Raises:
        ModelError: One of them does not run.
    """
    from onnxslim_llm.runtime.decoder import DecoderRunner
    from onnxslim_llm.runtime.session import open_session
    from onnxslim_llm.runtime.static_pair import StaticPair

    runner = DecoderRunner(open_session(source, threads=threads))
    pair = StaticPair(*(target.open(plan.path(directory), threads=threads) for plan in plans))
    length = max(1, min(pair.length - 1, pair.room))  # not full: what is padded must not matter
    steps = min(SIMULATED_STEPS if target.simulated else STEPS, pair.room + 1 - length)
    if tokens is None or not tokens.size:
        tokens = np.random.default_rng(_SEED).integers(0, runner.vocab, length)
    prompt = np.resize(tokens, length)[None]
    found = compare_texts(runner, pair, prompt, max(1, steps))
    done = max(1, steps)
    figures = Generation(
        prompt_tokens=length,
        tokens=done,
        top1_agreement=found.top1,
        kl_mean=found.kl,
        greedy_prefix_match=found.same / done,
    )
    limits = [gate.limit for gate in default_gates(recipe.gates, decoder=True) if gate.figure == "kl_mean"]
    limit = (limits[0] if limits else _LOSSLESS_KL) * _FEW_TOKENS
    return figures, Gate(name=PAIR_GATE, limit=limit, value=found.kl, ok=found.kl <= limit)


def compare_texts(source: Predictor, other: Predictor, prompt: NDArray[np.int64], steps: int) -> _Texts:
    """Return how often both choose the same token, their mean KL divergence, and the tokens before a difference."""
    fed = prompt
    mine, theirs = None, None
    equal: list[bool] = []
    divergence: list[float] = []
    for _ in range(steps):
        expected, mine = source.prefill(fed, mine)
        got, theirs = other.prefill(fed, theirs)
        a, b = (_log_softmax(logits[0, -1]) for logits in (expected, got))
        equal.append(bool(a.argmax() == b.argmax()))
        divergence.append(float(np.sum(np.exp(a) * (a - b))))
        fed = np.array([[int(a.argmax())]], np.int64)
    same = equal.index(False) if False in equal else len(equal)
    return _Texts(float(np.mean(equal)), float(np.mean(divergence)), same)


def _log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
