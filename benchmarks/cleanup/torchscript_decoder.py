"""A Llama-like decoder with KV cache, written the way torch's TorchScript exporter writes one.

Every constant is a node of its own, every size is read by Shape and Gather and put together by Concat, KV heads are
repeated through ConstantOfShape, Mul, Equal, Where and Expand, x / y is 1 / y times x, and the tied embedding is stored
a second time, transposed. Weights are random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
MAX_INT = 2**63 - 1


@dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder; `layers=10` gives about 2,000 nodes."""

    layers: int = 2
    hidden: int = 32
    ffn: int = 64
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 96

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


class _Exporter:
    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes = sizes
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.count = 0

    def node(self, op: str, *inputs: str, output: str = "", **attributes: object) -> str:
        name = f"/{op}_{self.count}"
        self.count += 1
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name, **attributes))
        return output

    def number(self, value: ArrayLike, dtype: type = np.int64) -> str:
        return self.node("Constant", value=numpy_helper.from_array(np.array(value, dtype)))

    def weight(self, name: str, *shape: int) -> str:
        values = (self.random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        return self.store(name, values)

    def store(self, name: str, values: NDArray[np.float32]) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def size(self, tensor: str, axis: int) -> str:
        return self.node("Gather", self.node("Shape", tensor), self.number(axis), axis=0)

    def shape(self, parts: Sequence[str | int]) -> str:
        rows = [self.number([p]) if isinstance(p, int) else self.node("Unsqueeze", p, self.number([0])) for p in parts]
        return self.node("Concat", *rows, axis=0)

    def norm(self, x: str, name: str) -> str:
        mean = self.node("ReduceMean", self.node("Pow", x, self.number(2.0, np.float32)), axes=[-1])
        root = self.node("Sqrt", self.node("Add", mean, self.number(1e-5, np.float32)))
        scaled = self.node("Mul", x, self.node("Div", self.number(1.0, np.float32), root))
        return self.node("Mul", self.store(name, np.ones(self.sizes.hidden, np.float32)), scaled)

    def part(self, x: str, start: int, end: int) -> str:
        bounds = (self.number([start]), self.number([end]), self.number([3]), self.number([1]))
        return self.node("Slice", x, *bounds)

    def rotate(self, x: str, cos: str, sin: str) -> str:
        half = self.sizes.head // 2
        turned = self.node("Concat", self.node("Neg", self.part(x, half, MAX_INT)), self.part(x, 0, half), axis=-1)
        return self.node("Add", self.node("Mul", x, cos), self.node("Mul", turned, sin))

    def heads(self, x: str, weight: str, count: int, like: str) -> str:
        product = self.node("MatMul", x, weight)
        target = self.shape([self.size(like, 0), self.size(like, 1), count, self.sizes.head])
        return self.node("Transpose", self.node("Reshape", product, target), perm=[0, 2, 1, 3])

    def repeat(self, x: str) -> str:
        s = self.sizes
        tall = self.node("Unsqueeze", x, self.number([2]))
        ones = self.node(
            "ConstantOfShape", self.number([5]), value=numpy_helper.from_array(np.array([1], np.int64), "value")
        )
        wanted = self.shape([self.size(x, 0), s.kv_heads, s.heads // s.kv_heads, self.size(x, 2), s.head])
        same = self.node("Equal", wanted, self.node("Mul", ones, self.number(-1)))
        wide = self.node("Expand", tall, self.node("Where", same, ones, wanted))
        return self.node("Reshape", wide, self.shape([self.size(x, 0), s.heads, self.size(x, 2), s.head]))

    def attention(self, x: str, layer: int, cos: str, sin: str, mask: str) -> str:
        s, name = self.sizes, f"model.layers.{layer}.self_attn"
        q = self.rotate(self.heads(x, self.weight(f"{name}.q", s.hidden, s.hidden), s.heads, x), cos, sin)
        width = s.kv_heads * s.head
        k = self.rotate(self.heads(x, self.weight(f"{name}.k", s.hidden, width), s.kv_heads, x), cos, sin)
        v = self.heads(x, self.weight(f"{name}.v", s.hidden, width), s.kv_heads, x)
        k = self.node("Concat", f"past_key_values.{layer}.key", k, axis=2, output=f"present.{layer}.key")
        v = self.node("Concat", f"past_key_values.{layer}.value", v, axis=2, output=f"present.{layer}.value")
        keys = self.node("Transpose", self.repeat(k), perm=[0, 1, 3, 2])
        scale = self.number(s.head**-0.5, np.float32)
        scores = self.node("Add", self.node("Mul", self.node("MatMul", q, keys), scale), mask)
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), self.repeat(v))
        flat = self.shape([self.size(x, 0), self.size(x, 1), s.hidden])
        joined = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), flat)
        return self.node("MatMul", joined, self.weight(f"{name}.o", s.hidden, s.hidden))

    def mlp(self, x: str, layer: int) -> str:
        s, name = self.sizes, f"model.layers.{layer}.mlp"
        gate = self.node("MatMul", x, self.weight(f"{name}.gate", s.hidden, s.ffn))
        up = self.node("MatMul", x, self.weight(f"{name}.up", s.hidden, s.ffn))
        gated = self.node("Mul", self.node("Mul", gate, self.node("Sigmoid", gate)), up)
        return self.node("MatMul", gated, self.weight(f"{name}.down", s.ffn, s.hidden))

    def mask(self) -> str:
        zero, one = self.number(0), self.number(1)
        past, total = self.size("past_key_values.0.key", 2), self.size("attention_mask", 1)
        rows = self.node("Add", self.node("Range", zero, self.size("input_ids", 1), one), past)
        columns = self.node("Unsqueeze", self.node("Range", self.number(0), total, self.number(1)), self.number([0]))
        causal = self.node("LessOrEqual", columns, self.node("Unsqueeze", rows, self.number([1])))
        causal = self.node("Unsqueeze", self.node("Unsqueeze", causal, self.number([0])), self.number([1]))
        given = self.node("Unsqueeze", "attention_mask", self.number([1]))
        given = self.node("Greater", self.node("Unsqueeze", given, self.number([2])), self.number(0))
        allowed = self.node("And", causal, given)
        return self.node("Where", allowed, self.number(0.0, np.float32), self.number(-1e9, np.float32))

    def angles(self) -> tuple[str, str]:
        half = self.sizes.head // 2
        where = self.node("Unsqueeze", self.node("Unsqueeze", "position_ids", self.number([1])), self.number([3]))
        speed = self.number(10000.0 ** (-np.arange(half) / half), np.float32)
        angle = self.node("Mul", self.node("Cast", where, to=TensorProto.FLOAT), speed)
        both = self.node("Concat", angle, angle, axis=-1)
        return self.node("Cos", both), self.node("Sin", both)

    def model(self) -> onnx.ModelProto:
        s = self.sizes
        table = (self.random.standard_normal((s.vocab, s.hidden)) / 4).astype(np.float32)
        x = self.node("Gather", self.store("model.embed_tokens.weight", table), "input_ids")
        mask, (cos, sin) = self.mask(), self.angles()
        for layer in range(s.layers):
            normed = self.norm(x, f"model.layers.{layer}.input_layernorm.weight")
            x = self.node("Add", x, self.attention(normed, layer, cos, sin, mask))
            normed = self.norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
            x = self.node("Add", x, self.mlp(normed, layer))
        x = self.norm(x, "model.norm.weight")
        self.node("MatMul", x, self.store("onnx::MatMul_lm_head", table.T), output="logits")
        return self._finish()

    def _finish(self) -> onnx.ModelProto:
        s, batch, tokens = self.sizes, "batch_size", "sequence_length"
        cache = [batch, s.kv_heads, "past_sequence_length", s.head]
        longer = [batch, s.kv_heads, "total_sequence_length", s.head]
        names = [f"{layer}.{kind}" for layer in range(s.layers) for kind in ("key", "value")]
        value, integer, real = helper.make_tensor_value_info, TensorProto.INT64, TensorProto.FLOAT
        inputs = [
            value("input_ids", integer, [batch, tokens]),
            value("attention_mask", integer, [batch, "total_sequence_length"]),
            value("position_ids", integer, [batch, tokens]),
            *(value(f"past_key_values.{name}", real, cache) for name in names),
        ]
        outputs = [
            value("logits", real, [batch, tokens, s.vocab]),
            *(value(f"present.{name}", real, longer) for name in names),
        ]
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, self.initializers)
        imports = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="pytorch")


def build(sizes: Sizes | None = None, seed: int = 0) -> onnx.ModelProto:
    """Return the decoder with random weights."""
    return _Exporter(sizes or Sizes(), seed).model()


def feeds(sizes: Sizes, batch: int, tokens: int, past: int, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """Return inputs for one step; the first sequence starts with a masked token where there are several."""
    random = np.random.default_rng(seed)
    mask = np.ones((batch, past + tokens), np.int64)
    if batch > 1:
        mask[0, 0] = 0
    cache = (batch, sizes.kv_heads, past, sizes.head)
    result: dict[str, NDArray[np.generic]] = {
        "input_ids": random.integers(0, sizes.vocab, (batch, tokens)),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
    }
    for layer in range(sizes.layers):
        for kind in ("key", "value"):
            values = random.standard_normal(cache).astype(np.float32)
            result[f"past_key_values.{layer}.{kind}"] = values
    return result
