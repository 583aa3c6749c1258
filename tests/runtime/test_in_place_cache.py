"""Decoders whose cache grows in place: the same logits as with separate caches, whatever the caller does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_place_models import HEAD_SIZE, KV_HEADS, VOCAB, decoder, in_place

from onnxslim_llm.compiler.cache_ranges import cache_ranges
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.decoder import DecoderRunner, DecoderState
from onnxslim_llm.runtime.generate import generate
from onnxslim_llm.runtime.session import open_session

#: Float32 sums over at most 200 keys in another order, of logits of magnitude 10 to 30.
ATOL = 1e-4


@pytest.fixture(scope="module")
def separate() -> DecoderRunner:
    return DecoderRunner(open_session(decoder().to_proto(), threads=1))


@pytest.fixture(scope="module")
def shared() -> DecoderRunner:
    return DecoderRunner(open_session(in_place(decoder(), "shared").to_proto(), threads=1))


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def assert_same(
    separate: DecoderRunner, shared: DecoderRunner, pieces: list[int], batch: int = 1, mask: np.ndarray | None = None
) -> None:
    mine: DecoderState | None = None
    other: DecoderState | None = None
    for i, length in enumerate(pieces):
        ids = tokens(batch, length, seed=i)
        seen = mask if mask is not None and i == 0 else np.ones((batch, length), np.int64)
        expected, mine = separate.extend(ids, mine, seen)
        actual, other = shared.extend(ids, other, seen)
        np.testing.assert_allclose(actual[seen != 0], expected[seen != 0], atol=ATOL)


def test_it_is_recognised(separate: DecoderRunner, shared: DecoderRunner) -> None:
    assert shared.signature.in_place
    assert not separate.signature.in_place
    assert [pair.past for pair in shared.signature.caches] == [pair.past for pair in separate.signature.caches]


@pytest.mark.parametrize("pieces", [[5, 1, 1, 1], [1, 1, 1], [3, 4, 2, 1], [63, 1, 1, 1], [64, 1], [130, 3, 1]])
def test_prompts_chunks_and_steps(separate: DecoderRunner, shared: DecoderRunner, pieces: list[int]) -> None:
    assert_same(separate, shared, pieces)


def test_without_binding_the_results_are_the_same(shared: DecoderRunner) -> None:
    """A caller that knows nothing of buffers gets whole ones back, and may feed them again."""
    session, pairs = shared.session, shared.signature.caches
    caches = {pair.past: np.zeros((1, KV_HEADS, 16, HEAD_SIZE), np.float32) for pair in pairs}
    state = None
    for i, length in enumerate([4, 1, 1]):
        ids = tokens(1, length, seed=i)
        expected, state = shared.extend(ids, state)
        mask = np.ones((1, state.length), np.int64)
        results = session.run({"input_ids": ids, "attention_mask": mask, **caches})
        np.testing.assert_allclose(results["logits"], expected, atol=ATOL)
        caches = {pair.past: results[pair.present] for pair in pairs}
        assert {value.shape[2] for value in caches.values()} == {16}


@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_padded_batches(separate: DecoderRunner, shared: DecoderRunner, side: str) -> None:
    mask = np.ones((3, 6), np.int64)
    mask[1, {"left": slice(0, 3), "right": slice(3, 6), "hole": slice(2, 4)}[side]] = 0
    assert_same(separate, shared, [6, 1, 1], batch=3, mask=mask)


def test_chunks_of_a_batch_go_token_by_token(separate: DecoderRunner, shared: DecoderRunner) -> None:
    assert_same(separate, shared, [4, 3, 2], batch=2)


def test_a_state_can_be_continued_in_two_ways(separate: DecoderRunner, shared: DecoderRunner) -> None:
    _, mine = separate.extend(tokens(1, 5))
    _, other = shared.extend(tokens(1, 5))
    branches = [tokens(1, 2, seed=1), tokens(1, 2, seed=2)]
    states = []
    for ids in branches:
        expected, state = separate.extend(ids, mine)
        actual, buffered = shared.extend(ids, other)
        np.testing.assert_allclose(actual, expected, atol=ATOL)
        states.append((state, buffered))
    for state, buffered in states:  # neither has overwritten the other's tokens
        last = tokens(1, 1, seed=3)
        np.testing.assert_allclose(shared.extend(last, buffered)[0], separate.extend(last, state)[0], atol=ATOL)


def test_the_same_text_is_generated(separate: DecoderRunner, shared: DecoderRunner) -> None:
    prompt = [3, 1, 4]
    expected = list(generate(separate, prompt, max_new_tokens=80))
    assert list(generate(shared, prompt, max_new_tokens=80)) == expected


def test_positions_that_count_the_cache() -> None:
    """Shape of a cache input means the tokens in it, not the room in the buffer."""
    separate = DecoderRunner(open_session(decoder(reads_past=True).to_proto(), threads=1))
    model = in_place(decoder(reads_past=True), "shared")
    assert all(node.op != "Shape" for tensor in model.graph.inputs[2:] for node in tensor.outputs)
    assert_same(separate, DecoderRunner(open_session(model.to_proto(), threads=1)), [5, 1, 2, 1])


def test_int8_codes_are_rounded_entries() -> None:
    """What the buffer holds, times the scale, is the float cache up to half a step."""
    largest = 8.0
    runner = DecoderRunner(open_session(in_place(decoder(), "int8", largest).to_proto(), threads=1))
    separate = DecoderRunner(open_session(decoder().to_proto(), threads=1))
    _, exact = separate.extend(tokens(1, 9))
    _, coded = runner.extend(tokens(1, 9))
    assert coded.buffers is not None
    name = runner.signature.caches[0].past
    codes = runner.session.array(coded.buffers.values[name])[:, :, :9]
    assert codes.dtype == np.int8
    step = largest / 127
    entries = separate.session.array(exact.caches[name])
    assert np.abs(entries).max() < largest
    np.testing.assert_allclose(codes * step, entries, atol=step / 2 * 1.001)


def test_int8_steps_follow_the_float_decoder() -> None:
    separate = DecoderRunner(open_session(decoder().to_proto(), threads=1))
    runner = DecoderRunner(open_session(in_place(decoder(), "int8", 8.0).to_proto(), threads=1))
    mine: DecoderState | None = None
    other: DecoderState | None = None
    for i, length in enumerate([6, 1, 1, 3]):
        expected, mine = separate.extend(tokens(1, length, seed=i), mine)
        actual, other = runner.extend(tokens(1, length, seed=i), other)
        # Entries of magnitude 4 are wrong by 0.03, a percent; what two layers and the classifier make of it is small
        # beside the logits' spread.
        assert np.abs(actual - expected).max() < 0.1 * expected.std()


def test_ranges_of_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(decoder(), path)
    ranges = cache_ranges(path, 1)
    assert set(ranges) == {f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")}
    assert all(r.shape == (KV_HEADS, HEAD_SIZE) and r.min() > 0 and r.max() < 100 for r in ranges.values())


def test_int8_needs_ranges() -> None:
    with pytest.raises(UsageError, match=r"no ranges of .present\.0\.key"):
        Pipeline('lower_kv_cache{cache="int8"}').run(decoder(), Context())


def test_without_a_mask_nothing_says_how_many_tokens_there_are() -> None:
    model = decoder(reads_past=True, masked=False)
    with pytest.raises(UsageError, match="no input says how many tokens there are"):
        Pipeline("lower_kv_cache").run(model)


def test_a_mask_that_calls_its_length_by_another_name() -> None:
    separate = DecoderRunner(open_session(decoder(reads_past=True).to_proto(), threads=1))
    model = decoder(reads_past=True)
    model.graph.inputs[1].shape = ["batch", "total_sequence_length"]
    shared = DecoderRunner(open_session(in_place(model, "shared").to_proto(), threads=1))
    assert_same(separate, shared, [5, 1, 2, 1])


def test_a_cache_that_something_else_reads() -> None:
    model = decoder()
    cache = model.graph.inputs[2]
    from onnxslim_llm.rewrite.edit import Builder

    op = Builder(model, "spy")
    spied = op.ReduceMax(cache, keepdims=0)
    spied.name, spied.dtype, spied.shape = "spied", np.dtype(np.float32), []
    model.graph.nodes += op.nodes
    model.graph.outputs.append(spied)
    with pytest.raises(UsageError, match="is read by 'ReduceMax', too"):
        Pipeline("lower_kv_cache").run(model)


def test_a_model_without_a_cache() -> None:
    model = decoder()
    del model.graph.nodes[:]
    with pytest.raises(UsageError, match="no attention with a KV cache"):
        Pipeline("lower_kv_cache").run(model)
