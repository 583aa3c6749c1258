"""A small decoder with a KV cache, with separate caches and with one that grows in place."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import AttentionForm, call_attention
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.passes.lower.attention.lower_kv_cache import LowerKvCache
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.pipeline import Pipeline

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_SIZE, LAYERS = 50, 32, 4, 2, 8, 2

Array = np.ndarray[Any, Any]


def decoder(seed: int = 0, *, reads_past: bool = False, masked: bool = True) -> Model:
    """Attentions on residual states, embeddings of tokens and of positions, which the mask counts.

    Args:
        seed: Of the weights.
        reads_past: Positions come from the cache's length instead.
        masked: There is an attention mask.
    """
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> Array:
        return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    proto = onnx.helper.make_model(
        onnx.helper.make_graph([], "decoder", [], []), opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8
    )
    model = from_proto(proto)
    ids = gs.Variable("input_ids", np.int64, ["batch", "sequence"])
    mask = gs.Variable("attention_mask", np.int64, ["batch", "past + sequence"])
    caches = [
        gs.Variable(f"past_key_values.{layer}.{part}", np.float32, ["batch", KV_HEADS, "past", HEAD_SIZE])
        for layer in range(LAYERS)
        for part in ("key", "value")
    ]
    op = Builder(model, "decoder")
    low = np.array(np.finfo(np.float32).min, np.float32)
    bias = op.Unsqueeze(op.Where(op.Cast(mask, to=onnx.TensorProto.BOOL), np.zeros((), np.float32), low), [1, 2])
    bias.dtype = np.dtype(np.float32)
    length = op.Shape(ids, start=1, end=2)
    if reads_past:
        past = op.Shape(caches[0], start=2, end=3)
        total = op.Add(past, length)
        places = op.Unsqueeze(op.Range(op.Squeeze(past), op.Squeeze(total), np.array(1, np.int64)), [0])
    else:
        counted = op.Sub(op.CumSum(mask, np.array(1, np.int64)), np.array(1, np.int64))
        counted = op.Max(counted, np.array(0, np.int64))
        total = op.Shape(mask, start=1, end=2)
        places = op.Slice(counted, op.Sub(total, length), total, [1])
    hidden = op.Add(op.Gather(weight(VOCAB, WIDTH) * 4, ids), op.Gather(weight(512, WIDTH) * 8, places))
    form = AttentionForm(past=True, present=True, bias=masked, causal=True, grouped=True)
    presents: list[gs.Variable] = []
    for layer in range(LAYERS):
        q, k, v = (op.MatMul(hidden, weight(WIDTH, n * HEAD_SIZE)) for n in (HEADS, KV_HEADS, KV_HEADS))
        y = gs.Variable(f"y{layer}", np.float32, ["batch", "sequence", WIDTH])
        present = [
            gs.Variable(f"present.{layer}.{part}", np.float32, ["batch", KV_HEADS, "past + sequence", HEAD_SIZE])
            for part in ("key", "value")
        ]
        op.nodes.append(
            call_attention(
                model,
                f"attention{layer}",
                form,
                [q, k, v, *caches[2 * layer : 2 * layer + 2], *([bias] if masked else [])],
                [y, *present],
                q_num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                scale=HEAD_SIZE**-0.5,
            )
        )
        presents += present
        hidden = op.Add(hidden, y)
    logits = op.MatMul(hidden, weight(WIDTH, VOCAB))
    logits.name, logits.dtype, logits.shape = "logits", np.dtype(np.float32), ["batch", "sequence", VOCAB]
    model.graph.inputs = [ids, *([mask] if masked else []), *caches]
    model.graph.outputs = [logits, *presents]
    model.graph.nodes = op.nodes if masked else [n for n in op.nodes if not _follows(n, mask)]
    return model


def _follows(node: gs.Node, tensor: gs.Tensor) -> bool:
    return any(t is tensor or any(_follows(made, tensor) for made in t.inputs) for t in node.inputs)


def in_place(model: Model, cache: Literal["shared", "int8"], largest: float = 0.0) -> Model:
    """The model with its caches in buffers; for int8, `largest` is the magnitude that all channels are scaled for."""
    ranges = {t.name: np.full((KV_HEADS, HEAD_SIZE), largest) for t in model.graph.outputs[1:]}
    Pipeline([LowerKvCache(cache=cache)]).run(model, Context(cache_ranges=ranges))
    return model
