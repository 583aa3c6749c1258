"""One or two attentions of any form, and the comparison of a lowered model with the concept's body."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from onnxslim_llm.concepts.attention import AttentionForm, call_attention
from onnxslim_llm.ir.model import Model, from_proto

HEADS, KV_HEADS, WIDTH = 4, 2, 8
#: Float32 sums of at most 64 terms around one in another order: some units of 2^-24 each.
ATOL = 5e-6

Array = np.ndarray[Any, Any]


def attention_model(
    form: AttentionForm,
    *,
    bias: tuple[Any, ...] = (),
    window: int = 0,
    cross: bool = False,
    layers: int = 1,
    width: int = WIDTH,
) -> Model:
    """Attentions that read the same inputs; `bias` is a shape, made of B, H, S, T and 1, `width` the size of a head."""
    keys = "E" if cross else "S"
    kv_heads = KV_HEADS if form.grouped else HEADS

    def rows(length: str, heads: int) -> list[Any]:
        return ["B", heads, length, width] if form.heads_major else ["B", length, heads * width]

    shapes = {
        "Q": rows("S", HEADS),
        "K": rows(keys, kv_heads),
        "V": rows(keys, kv_heads),
        "past_key": ["B", kv_heads, "P", width],
        "past_value": ["B", kv_heads, "P", width],
        "bias": [{"T": f"P + {keys}" if form.past else keys, "H": HEADS}.get(d, d) for d in bias],
    }
    proto = onnx.helper.make_model(
        onnx.helper.make_graph([], "graph", [], []),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=8,
    )
    model = from_proto(proto)
    inputs = {name: gs.Variable(name, np.float32, shapes[name]) for name in form.inputs}
    model.graph.inputs = list(inputs.values())
    for layer in range(layers):
        cache = ["B", kv_heads, "total", width]
        outputs = [
            gs.Variable(f"{name}{layer}", np.float32, shapes["Q"] if name == "Y" else cache) for name in form.outputs
        ]
        node = call_attention(
            model,
            f"attention{layer}",
            form,
            [inputs[name] for name in form.inputs],
            outputs,
            q_num_heads=HEADS,
            kv_num_heads=kv_heads,
            scale=0.4,
            softcap=3.0 if form.softcap else 0.0,
            window=window,
        )
        model.graph.nodes.append(node)
        model.graph.outputs += outputs
    return model


def feeds_for(model: Model, sizes: dict[str, int], seed: int = 0) -> dict[str, Array]:
    """Random operands; of a bias, some columns are masked, so that each row sees a key all the same."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for tensor in model.graph.inputs:
        shape = [_size(dim, sizes) for dim in tensor.shape]
        feeds[tensor.name] = rng.normal(size=shape).astype(np.float32)
        if tensor.name == "bias":
            feeds[tensor.name][..., 1::3] = np.finfo(np.float32).min
    return feeds


def _size(dim: int | str, sizes: dict[str, int]) -> int:
    return dim if isinstance(dim, int) else sum(sizes.get(part, 0) or int(part.isdigit()) for part in dim.split(" + "))


def run(model: Model, feeds: dict[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    proto = model.to_proto().SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, ["CPUExecutionProvider"])
    results: list[Array] = session.run(None, feeds)
    return results


def assert_same(before: Model, after: Model, sizes: dict[str, int]) -> None:
    feeds = feeds_for(before, sizes)
    for expected, actual in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, atol=ATOL)
