"""Heads and blocks of models that several exporters write: what adds nothing goes, and nothing changes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from zoo.access import model_path

from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import ArrayWeight, constant, weight_of
from onnxslim_llm.passes.prune.prune_heads import PruneHeads
from onnxslim_llm.passes.prune.remove_blocks import RemoveBlocks
from onnxslim_llm.products.blocks import find_blocks
from onnxslim_llm.products.heads import find_head_layers
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session

Array = np.ndarray

#: Decoders with grouped and with single heads, packed projections and biases, ALiBi, norms of heads, parallel layers,
#: norms behind the branches.
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "bloom", "opt", "gemma2", "gptj", "phi3")
EXPORTERS = ("optimum", "dynamo-cache", "script")

#: Leaving out zeros may change the order of float32 sums around one.
TOLERANCE = 1e-5


def fused(name: str, exporter: str) -> Model:
    model = open_model(model_path(name, exporter))
    Pipeline(Recipe.load("safe").build()).run(model)
    infer_shapes(model)
    return model


def logits(model: Model) -> Array:
    """Of a prompt and what follows it."""
    runner = DecoderRunner(open_session(model.to_proto(), threads=1, optimise=False))
    ids = np.random.default_rng(0).integers(3, runner.vocab, (2, 9))
    _, state = runner.extend(ids[:, :6])
    result: Array = runner.extend(ids[:, 6:], state)[0]
    return result


def assert_nothing_changes(model: Model, step: Pass, sites: int) -> None:
    before = model.copy()
    (record,) = Pipeline([step]).run(model, Context())
    assert record.changed == sites, [skip.reason for skip in record.skipped]
    expected, actual = logits(before), logits(model)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.zoo
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_that_say_nothing(name: str, exporter: str) -> None:
    model = fused(name, exporter)
    layers = find_head_layers(model, Change())
    for number, layer in enumerate(layers):
        product = layer.product
        values = product.weight.load().astype(product.weight.dtype)
        rows = layer.rows(np.array([number % layer.groups]))
        values[rows if product.k_axis == 0 else (slice(None), rows)] = 0
        product.constant.values = ArrayWeight(values)
    assert len(layers) == 2
    assert_nothing_changes(model, PruneHeads(share=1 / layers[0].groups, refit=False), 2)


@pytest.mark.zoo
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_that_adds_nothing(name: str, exporter: str) -> None:
    model = fused(name, exporter)
    blocks = find_blocks(model, Change())
    assert len(blocks) == 2
    for node in blocks[0].nodes:
        for index, tensor in enumerate(node.inputs):
            product = node.op in ("MatMul", "Gemm") and index > 0
            bias = node.op == "Add" and len(tensor.shape or ()) == 1
            if isinstance(tensor, gs.Constant) and (product or bias):
                zeros = np.zeros(tensor.shape, weight_of(tensor).dtype)
                node.inputs[index] = constant(model.fresh_name(f"{tensor.name}_zero"), zeros)
    assert_nothing_changes(model, RemoveBlocks(blocks=(0,), refit=False), 1)
