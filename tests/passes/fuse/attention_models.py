"""Attentions in ONNX text, put together from parts that a test replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from block_models import proto
from fusion_checks import Fused, floats, fuse

from onnxslim_llm.concepts.attention import AttentionForm, attention_form, is_attention
from onnxslim_llm.passes.fuse.fuse_attention import FuseAttention

__all__ = ["BATCH", "HEADS", "PAST", "SIZE", "WIDTH", "attention", "calls", "feeds_of", "form_of", "fuse_parts"]

Array = np.ndarray[Any, Any]

#: B, S, H and D; P is the length of a cache.
BATCH, SIZE, HEADS, WIDTH, PAST = 2, 5, 4, 8, 3

#: Four heads of eight from [B, S, 32]; a test that replaces one part keeps the names that the others read.
PARTS = {
    "inputs": "float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] v, float[B, 1, S, S] mask",
    "outputs": "float[B, S, 32] y",
    "q": """
        q4 = Reshape (q, heads)
        qt = Transpose <perm = [0, 2, 1, 3]> (q4)
    """,
    "k": """
        k4 = Reshape (k, heads)
        kt = Transpose <perm = [0, 2, 3, 1]> (k4)
    """,
    "v": """
        v4 = Reshape (v, heads)
        vt = Transpose <perm = [0, 2, 1, 3]> (v4)
    """,
    "products": "products = MatMul (qt, kt)",
    "scores": """
        scaled = Mul (products, scale)
        scores = Add (scaled, mask)
    """,
    "softmax": "weights = Softmax <axis = -1> (scores)",
    "weights": "",
    "mix": "mixed = MatMul (weights, vt)",
    "result": """
        back = Transpose <perm = [0, 2, 1, 3]> (mixed)
        y = Reshape (back, flat)
    """,
}

CONSTANTS: dict[str, Array] = {
    "heads": np.array([0, 0, HEADS, WIDTH]),
    "flat": np.array([0, 0, HEADS * WIDTH]),
    "scale": np.array(0.3, np.float32),
    "zero": np.array(0, np.float32),
    "minus_inf": np.array(-np.inf, np.float32),
    "lowest": np.array(np.finfo(np.float32).min),
}
_SIZES = {"B": BATCH, "S": SIZE, "P": PAST, "T": PAST + SIZE, "N": BATCH * HEADS}


def attention(opset: int = 18, constants: Mapping[str, Array] | None = None, **parts: str) -> onnx.ModelProto:
    """A model of PARTS, some of them replaced."""
    used = {**PARTS, **parts}
    body = "\n".join(text for name, text in used.items() if name not in ("inputs", "outputs"))
    given = {**CONSTANTS, **(constants or {})}
    words = {word.strip("(),") for word in body.split()}
    text = f"agraph ({used['inputs']}) => ({used['outputs']}) {{\n{body}\n}}"
    return proto(text, opset, **{name: value for name, value in given.items() if name in words})


def feeds_of(source: onnx.ModelProto, **given: Array) -> dict[str, Array]:
    """Random inputs; masks of booleans hide some keys, but never all keys of a query."""
    found: dict[str, Array] = {}
    for seed, entry in enumerate(source.graph.input):
        tensor = entry.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else _SIZES[d.dim_param] for d in tensor.shape.dim]
        if tensor.elem_type == onnx.TensorProto.BOOL and shape:
            seen = np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
            seen[..., :1] = True
            found[entry.name] = seen
        else:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            found[entry.name] = floats(*shape, seed=seed, dtype=dtype)
    return found | given


def fuse_parts(
    feeds: Mapping[str, Array] | None = None,
    opset: int = 18,
    constants: Mapping[str, Array] | None = None,
    tolerance: float | None = None,
    **parts: str,
) -> Fused:
    """Fuse a model of parts and check the results."""
    source = attention(opset, constants, **parts)
    more = {} if tolerance is None else {"tolerance": tolerance}
    return fuse(FuseAttention(), source, feeds_of(source, **(feeds or {})), **more)


def calls(fused: Fused) -> list[gs.Node]:
    """The attentions of a model."""
    return [node for graph in fused.model.graphs() for node in graph.nodes if is_attention(node)]


def form_of(fused: Fused) -> AttentionForm:
    """The form of the only attention."""
    (node,) = calls(fused)
    return attention_form(node)
