from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from reference_decoder import DecoderSpec, build

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.generate import Sampling, generate, pick
from onnxslim_llm.runtime.session import open_session


@pytest.fixture(scope="module")
def runner() -> DecoderRunner:
    return DecoderRunner(open_session(build(DecoderSpec()), threads=1))


def test_greedy_is_the_argmax_of_the_whole_text(runner: DecoderRunner) -> None:
    prompt = [3, 1, 4]
    made = list(generate(runner, prompt, max_new_tokens=12))
    assert len(made) == 12
    logits, _ = runner.prefill(np.array([[*prompt, *made]]))
    assert made == logits[0, 2:-1].argmax(axis=-1).tolist()


def test_with_and_without_cache_are_equal(runner: DecoderRunner) -> None:
    slow = DecoderRunner(open_session(build(DecoderSpec(cache=False)), threads=1))
    assert list(generate(slow, [9, 2], max_new_tokens=10)) == list(generate(runner, [9, 2], max_new_tokens=10))


def test_prompt_in_chunks_is_equal(runner: DecoderRunner) -> None:
    prompt = list(range(20))
    assert list(generate(runner, prompt, max_new_tokens=5, chunk=3)) == list(generate(runner, prompt, max_new_tokens=5))


def test_stops_at_an_end_token_without_yielding_it(runner: DecoderRunner) -> None:
    free = list(generate(runner, [3, 1, 4], max_new_tokens=12))
    end = free[5]
    cut = free.index(end)
    assert list(generate(runner, [3, 1, 4], max_new_tokens=12, eos=[end])) == free[:cut]


def test_stops_when_the_context_is_full(runner: DecoderRunner) -> None:
    assert len(list(generate(runner, [3, 1, 4], max_new_tokens=50, context_length=8))) == 5


def test_streams_lazily(runner: DecoderRunner) -> None:
    assert len(list(islice(generate(runner, [1], max_new_tokens=10**9), 3))) == 3


def test_same_seed_same_text_other_seed_other_text(runner: DecoderRunner) -> None:
    texts = [
        list(generate(runner, [5], max_new_tokens=20, sampling=Sampling(temperature=1.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_top_k_one_and_tiny_top_p_are_greedy(runner: DecoderRunner) -> None:
    greedy = list(generate(runner, [5], max_new_tokens=10))
    for sampling in (Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_p=1e-9)):
        assert list(generate(runner, [5], max_new_tokens=10, sampling=sampling)) == greedy


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    rng = np.random.default_rng(0)
    drawn = [pick(logits, Sampling(temperature=1.0), rng) for _ in range(4000)]
    # Standard deviation of a share is below sqrt(0.25 / 4000) = 0.008; four of them.
    assert np.bincount(drawn) / 4000 == pytest.approx([0.5, 0.3, 0.2], abs=0.032)


def test_top_p_keeps_the_token_that_reaches_the_limit() -> None:
    logits = np.log(np.array([0.2, 0.5, 0.3]))
    rng = np.random.default_rng(0)
    assert {pick(logits, Sampling(1.0, top_p=0.6), rng) for _ in range(300)} == {1, 2}
    assert {pick(logits, Sampling(1.0, top_p=0.5), rng) for _ in range(300)} == {1}


def test_temperature_sharpens() -> None:
    logits = np.log(np.array([0.6, 0.4]))
    rng = np.random.default_rng(0)
    cold = np.mean([pick(logits, Sampling(0.2), rng) for _ in range(500)])
    assert cold < 0.25  # 0.4^5 / (0.4^5 + 0.6^5) = 0.12


def test_ties_take_the_lowest_id() -> None:
    assert pick(np.array([1.0, 2.0, 2.0]), Sampling(), np.random.default_rng(0)) == 1


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_senseless_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)  # type: ignore[arg-type]


def test_errors(runner: DecoderRunner) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        generate(runner, [], max_new_tokens=1)
    with pytest.raises(UsageError, match="context holds 3"):
        generate(runner, [1, 2, 3], max_new_tokens=1, context_length=3)
    with pytest.raises(ModelError, match="vocabulary"):
        list(generate(runner, [999], max_new_tokens=1))


def test_logits_that_are_not_finite_are_refused() -> None:
    proto = build(DecoderSpec())
    weight = next(t for t in proto.graph.initializer if t.name == "lm_head.weight")
    weight.raw_data = np.full(tuple(weight.dims), np.nan, np.float32).tobytes()
    with pytest.raises(ModelError, match="not finite"):
        list(generate(DecoderRunner(open_session(proto)), [1], max_new_tokens=1))
