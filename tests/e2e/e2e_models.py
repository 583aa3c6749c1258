"""Small models of every kind that users bring, valid and broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser
from reference_decoder import DecoderSpec, build

Array = np.ndarray[Any, Any]

WIDTH = 128
"""Rows and columns of most weights: a model with a weight of 16,384 elements is compiled to few bits by default."""

MLP = f"""agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{
    a = MatMul (x, W1)
    b = Add (a, bias)
    c = Relu (b)
    y = Gemm <alpha = 0.5, transB = 1> (c, W2, bias)
}}"""

ENCODER = f"""agraph (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
    => (float[batch, sequence, {WIDTH}] last_hidden_state) {{
    one = Constant <value = float {{1.0}}> ()
    low = Constant <value = float {{-10000.0}}> ()
    axis = Constant <value = int64[1] {{1}}> ()
    e = Gather (E, input_ids)
    n = LayerNormalization <axis = -1> (e, gain, bias)
    q = MatMul (n, W1)
    k = MatMul (n, W2)
    kt = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul (q, kt)
    m = Cast <to = 1> (attention_mask)
    hidden = Sub (one, m)
    far = Mul (hidden, low)
    row = Unsqueeze (far, axis)
    t = Add (s, row)
    p = Softmax <axis = -1> (t)
    v = MatMul (n, W4)
    mixed = MatMul (p, v)
    o = MatMul (mixed, W3)
    last_hidden_state = Add (o, e)
}}"""

BRANCHES = f"""agraph (float[batch, {WIDTH}] x, bool flag) => (float[batch, {WIDTH}] y) {{
    h = MatMul (x, W1)
    y = If (flag) <
        then_branch = yes () => (float[batch, {WIDTH}] a) {{ t = MatMul (h, W2)  a = Tanh (t) }},
        else_branch = no () => (float[batch, {WIDTH}] b) {{ b = Add (h, x) }}>
}}"""

LOOP = f"""agraph (float[batch, {WIDTH}] x, int64 times) => (float[batch, {WIDTH}] y) {{
    go = Constant <value = bool {{1}}> ()
    y = Loop (times, go, x) <body = body (int64 i, bool more, float[batch, {WIDTH}] s)
        => (bool again, float[batch, {WIDTH}] next) {{
        again = Identity (more)
        p = MatMul (s, W1)
        next = Tanh (p)
    }}>
}}"""

SCAN = f"""agraph (float[{WIDTH}] start, float[steps, {WIDTH}] x) => (float[{WIDTH}] last, float[steps, {WIDTH}] y) {{
    last, y = Scan <num_scan_inputs = 1, body = body (float[{WIDTH}] s, float[{WIDTH}] v)
        => (float[{WIDTH}] next, float[{WIDTH}] out) {{
        p = MatMul (s, W1)
        q = Add (p, v)
        next = Tanh (q)
        out = Identity (next)
    }}> (start, x)
}}"""

FUNCTIONS = f"""agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{
    a = my.Dense <slope = 0.1> (x, W1, bias)
    y = my.Dense <slope = 0.2> (a, W2, bias)
}}
<domain: "my", opset_import: ["" : 18, "my" : 1]> Dense <slope> (v, w, b) => (r) {{
    p = MatMul (v, w)
    q = my.Shift (p, b)
    r = LeakyRelu <alpha : float = @slope> (q)
}}
<domain: "my", opset_import: ["" : 18]> Shift (v, b) => (r) {{ r = Add (v, b) }}"""

QDQ = f"""agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{
    xq = QuantizeLinear (x, x_scale, x_zero)
    xd = DequantizeLinear (xq, x_scale, x_zero)
    w = DequantizeLinear <axis = 1> (Q, q_scale, q_zero)
    y = MatMul (xd, w)
}}"""

NBITS = f"""agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{
    y = com.microsoft.MatMulNBits <K = {WIDTH}, N = {WIDTH}, bits = 4, block_size = 32> (x, B, scales)
}}"""


def decoder(**habits: Any) -> onnx.ModelProto:
    """A random decoder, by default with 0.1 M parameters; `habits` as in DecoderSpec."""
    return build(DecoderSpec(**habits))


def draw(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Normal weights that keep the size of what is multiplied with them."""
    values = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[0])
    return values.astype(dtype)


def from_text(text: str, opset: int = 18, imports: str = "", ir_version: int = 10, **weights: Array) -> onnx.ModelProto:
    """A model in ONNX text with these initializers. It is not checked: some of them are meant to be broken."""
    model = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}{imports}]>\n{text}')
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.SetInParent()  # the text of a scalar says nothing about its shape
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model, weights inline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def save_external(model: onnx.ModelProto, path: Path, location: str = "weights.bin") -> Path:
    """Write a model with all its weights in one file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = bytearray()
    for tensor in model.graph.initializer:
        raw = numpy_helper.to_array(tensor).tobytes()
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", len(content)), ("length", len(raw))):
            tensor.external_data.add(key=key, value=str(value))
        content += raw
    (path.parent / location).write_bytes(content)
    return save(model, path)


def _dense(seed: int = 1) -> Array:
    return draw(WIDTH, WIDTH, seed=seed)


def mlp() -> onnx.ModelProto:
    """MatMul, and Gemm with a transposed weight, a factor and a bias."""
    return from_text(MLP, W1=_dense(1), W2=_dense(2), bias=draw(WIDTH, seed=3))


def encoder() -> onnx.ModelProto:
    """Token embedding, LayerNorm and attention with a padding mask; no logits."""
    weights = {name: _dense(seed) for seed, name in enumerate(("W1", "W2", "W3", "W4"))}
    gain = np.ones(WIDTH, np.float32)
    return from_text(ENCODER, E=draw(256, WIDTH, seed=5) * 16, gain=gain, bias=draw(WIDTH, seed=3), **weights)


def branches() -> onnx.ModelProto:
    """If, with a weight of the graph around it read inside of a branch."""
    return from_text(BRANCHES, W1=_dense(1), W2=_dense(2))


def branches_with_own_weights() -> onnx.ModelProto:
    """If, whose branch has an initializer of its own."""
    model = branches()
    inner = model.graph.node[1].attribute[0].g
    inner.initializer.append(model.graph.initializer.pop(1))
    assert inner.initializer[0].name == "W2"
    return model


def loop() -> onnx.ModelProto:
    """Loop over a product."""
    return from_text(LOOP, W1=_dense())


def scan() -> onnx.ModelProto:
    """Scan over a product."""
    return from_text(SCAN, W1=_dense())


def functions() -> onnx.ModelProto:
    """Model-local functions that call each other and take attributes."""
    return from_text(FUNCTIONS, imports=', "my" : 1', W1=_dense(1), W2=_dense(2), bias=draw(WIDTH, seed=3))


def sparse() -> onnx.ModelProto:
    """An initializer that is stored sparsely."""
    model = from_text(f"agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{ y = MatMul (x, W) }}")
    places = np.arange(0, WIDTH * WIDTH, 37, dtype=np.int64)
    values = numpy_helper.from_array(draw(len(places), seed=2) * 8, "W")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(places), [WIDTH, WIDTH])
    )
    return model


def qdq() -> onnx.ModelProto:
    """Weights and activations that are int8 already."""
    rng = np.random.default_rng(0)
    return from_text(
        QDQ,
        x_scale=np.array(0.02, np.float32),
        x_zero=np.array(0, np.int8),
        Q=rng.integers(-127, 128, (WIDTH, WIDTH)).astype(np.int8),
        q_scale=(rng.random(WIDTH) / 500).astype(np.float32),
        q_zero=np.zeros(WIDTH, np.int8),
    )


def nbits() -> onnx.ModelProto:
    """A weight that is a MatMulNBits already."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (WIDTH, WIDTH // 32, 16)).astype(np.uint8)
    scales = (rng.random(WIDTH * WIDTH // 32) / 50).astype(np.float32)
    return from_text(NBITS, imports=', "com.microsoft" : 1', B=codes, scales=scales)


def overridable() -> onnx.ModelProto:
    """A weight that is a graph input too, which a caller may replace: it is no constant."""
    model = mlp()
    model.graph.input.append(helper.make_tensor_value_info("W1", TensorProto.FLOAT, [WIDTH, WIDTH]))
    return model


def oldest() -> onnx.ModelProto:
    """IR 3, opset 7: every initializer is an input too, as all exporters wrote it then."""
    text = f"""agraph (float[4, {WIDTH}] x, float[{WIDTH}, {WIDTH}] W) => (float[4, {WIDTH}] y) {{
        a = MatMul (x, W)
        u = Unsqueeze <axes = [0]> (a)
        s = Squeeze <axes = [0]> (u)
        y = Softmax (s)
    }}"""
    return from_text(text, opset=7, ir_version=3, W=_dense())


def double() -> onnx.ModelProto:
    """Computes in float64, which no quantizer touches."""
    text = f"agraph (double[batch, {WIDTH}] x) => (double[batch, {WIDTH}] y) {{ y = MatMul (x, W) }}"
    return from_text(text, W=draw(WIDTH, WIDTH, dtype=np.float64))


def half_weights() -> onnx.ModelProto:
    """bfloat16 weights behind casts, computed with in float32."""
    text = f"""agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{
        W = Cast <to = 1> (stored)
        y = MatMul (x, W)
    }}"""
    return from_text(text, stored=draw(WIDTH, WIDTH).astype(ml_dtypes.bfloat16))


def convolution() -> onnx.ModelProto:
    """A vision tower in small: no product of matrices but the last."""
    text = """agraph (float[batch, 3, 16, 16] image) => (float[batch, 10] scores) {
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, kernel)
        b = Relu (a)
        c = GlobalAveragePool (b)
        d = Flatten (c)
        scores = MatMul (d, head)
    }"""
    return from_text(text, kernel=draw(8, 3, 3, 3), head=draw(8, 10))


def strings() -> onnx.ModelProto:
    """A string among the constants; nothing to compress."""
    model = from_text("agraph (float[n] x) => (float[n] y) { y = Neg (x) }")
    model.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"b"]))
    model.graph.node.append(helper.make_node("Identity", ["words"], ["labels"]))
    model.graph.output.append(helper.make_tensor_value_info("labels", TensorProto.STRING, [2]))
    return model


OTHERS: dict[str, Callable[[], onnx.ModelProto]] = {
    made.__name__: made
    for made in (
        *(mlp, encoder, branches, branches_with_own_weights, loop, scan, functions, sparse, qdq, nbits),
        *(overridable, oldest, double, half_weights, convolution, strings),
    )
}
"""Models that are no decoders, by name."""

HOPELESS = ["--recipe=int4-fast"] + [
    f"--set=quantize_weights.{text}"
    for text in ("bits=2", "sensitive_bits=2", "embedding_bits=2", "lm_head_bits=2", "block=128", "method=rtn")
]
"""Options with which a decoder misses the gate of the recipe int4-fast by far."""

DECODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied by Transpose": {"tied": "transpose"},
    "tied by a copy": {"tied": "duplicate"},
    "float16": {"dtype": "float16"},
    "float16, tied by a copy": {"dtype": "float16", "tied": "duplicate"},
    "no cache": {"cache": False},
    "no mask": {"mask": False},
    "no positions": {"positions": False},
    "no cache, mask, positions": {"cache": False, "mask": False, "positions": False},
    "last token only": {"last_token_only": True},
    "no grouped heads": {"heads": 4, "kv_heads": 4},
    "odd sizes": {"vocab": 251, "ffn": 100, "hidden": 72, "heads": 3, "kv_heads": 1, "head_dim": 24},
}
"""Habits of decoders, by name."""
