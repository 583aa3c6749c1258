from __future__ import annotations

import numpy as np
import onnx
from reference_decoder import DecoderSpec, build

from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.generate import generate
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.verify.greedy import GreedyMatch, greedy_match

PROMPTS = np.random.default_rng(3).integers(0, 256, (3, 5))


def runner_of(proto: onnx.ModelProto) -> DecoderRunner:
    return DecoderRunner(open_session(proto, threads=1))


def with_head(change: np.ndarray | float) -> onnx.ModelProto:
    proto = build(DecoderSpec())
    tensor = next(t for t in proto.graph.initializer if t.name == "lm_head.weight")
    weight = onnx.numpy_helper.to_array(tensor) + np.asarray(change, np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    return proto


def noise(scale: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, (64, 256))


def test_the_first_divergence_is_that_of_free_running_texts() -> None:
    source, other = runner_of(build(DecoderSpec())), runner_of(with_head(noise(0.05)))
    found = greedy_match(source, other, PROMPTS, 20, tie_margin=0.0)
    expected: list[int | None] = []
    for prompt in PROMPTS.tolist():
        a, b = (list(generate(runner, prompt, max_new_tokens=20)) for runner in (source, other))
        expected.append(next((i for i in range(20) if a[i] != b[i]), None))
    assert list(found.first_divergence) == expected
    assert any(i is not None for i in expected)


def test_ties_do_not_count() -> None:
    """Two tokens with the same logits in the source: the artifact's tiny preference for the other is no difference."""
    proto = build(DecoderSpec())
    tensor = next(t for t in proto.graph.initializer if t.name == "lm_head.weight")
    weight = onnx.numpy_helper.to_array(tensor).copy()
    weight[:, 1::2] = weight[:, 0::2]
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    bias = onnx.numpy_helper.from_array(np.tile([0.0, 1e-4], 128).astype(np.float32), "bias")
    other.graph.initializer.append(bias)
    other.graph.node[-1].output[0] = "plain"
    other.graph.node.append(onnx.helper.make_node("Add", ["plain", "bias"], ["logits"]))
    pair = runner_of(proto), runner_of(other)
    tolerant = greedy_match(*pair, PROMPTS, 8, tie_margin=1e-3)
    assert tolerant.first_divergence == (None,) * 3
    assert tolerant.ties == 3 * 8
    strict = greedy_match(*pair, PROMPTS, 8, tie_margin=-1.0)
    assert strict.first_divergence == (0,) * 3
    assert strict.ties == 0


def test_a_margin_does_not_forgive_real_differences() -> None:
    source, other = runner_of(build(DecoderSpec())), runner_of(with_head(noise(0.3)))
    assert greedy_match(source, other, PROMPTS, 20, tie_margin=2e-3).prefix_match < 0.5


def test_fixed_batches_run_in_groups() -> None:
    proto = build(DecoderSpec())
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    fixed = runner_of(proto)
    assert fixed.signature.batch == 2
    free = runner_of(build(DecoderSpec()))
    found = greedy_match(fixed, fixed, PROMPTS, 6, tie_margin=0.0)
    assert found.first_divergence == (None,) * 3
    assert greedy_match(free, fixed, PROMPTS, 6, tie_margin=1e-3).first_divergence == (None,) * 3


def test_prefix_match() -> None:
    assert GreedyMatch(64, (None, 16, 0), 0).prefix_match == (1 + 0.25 + 0) / 3
    assert GreedyMatch(64, (), 0).prefix_match == 1.0
