"""Random Llama-like decoders in plain ai.onnx, from a few kilobytes to billions of parameters.

Grouped-query attention, rotary positions (half-split), RMSNorm and SwiGLU with the input and output names of Optimum.
Weights are drawn per tensor from (seed, name) and written block by block, so a 2 GB model costs tens of megabytes of
memory and the same file comes out on every machine with the same numpy.

    python benchmarks/reference_decoder.py OUT.onnx --preset 1.1b --dtype float16
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

_BLOCK = 4 << 20  # elements drawn at a time while writing: 16 MB of float32
_ALIGN = 64
_LOGIT_STD = 2.5  # gives a next-token distribution that is neither flat nor one-hot
_ELEMENT = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
_NUMPY: dict[str, type[np.floating]] = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes and habits of one random decoder.

    Args:
        tied: how the classifier is stored: "no" (its own weight), "transpose" (the embedding behind a Transpose, as
            dynamo exports do) or "duplicate" (the embedding stored a second time, transposed, as TorchScript does).
        dtype: of weights, activations, logits and cache; norms and rotary angles are computed in float32.
        cache, mask, positions: whether the model has past_key_values / attention_mask / position_ids inputs.
        last_token_only: whether the logits are [B, 1, V] instead of [B, S, V].
    """

    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 160
    tied: Literal["no", "transpose", "duplicate"] = "no"
    dtype: Literal["float32", "float16"] = "float32"
    cache: bool = True
    mask: bool = True
    positions: bool = True
    last_token_only: bool = False
    rope_theta: float = 10000.0
    opset: int = 18
    seed: int = 0


PRESETS = {
    "tiny": DecoderSpec(),
    "small": DecoderSpec(vocab=4096, hidden=256, layers=6, heads=8, kv_heads=4, head_dim=32, ffn=768),
    "125m": DecoderSpec(vocab=32000, hidden=768, layers=12, heads=12, kv_heads=4, head_dim=64, ffn=2048),
    "1.1b": DecoderSpec(vocab=32000, hidden=2048, layers=22, heads=32, kv_heads=4, head_dim=64, ffn=5632),
}


@dataclass(frozen=True)
class _Weight:
    name: str
    dims: tuple[int, int] | tuple[int]
    std: float  # 0 means all ones
    source: str = ""  # name whose numbers are used, transposed ("duplicate" ties)


def _blocks(weight: _Weight, spec: DecoderSpec) -> Iterator[NDArray[np.floating]]:
    """Yield the weight's elements in C order, a bounded number at a time."""
    dtype = _NUMPY[spec.dtype]
    if weight.source:
        other = _Weight(weight.source, weight.dims[::-1], weight.std)
        yield np.ascontiguousarray(np.concatenate(list(_blocks(other, spec))).reshape(other.dims).T).ravel()
        return
    left = math.prod(weight.dims)
    digest = hashlib.sha256(f"{spec.seed}:{weight.name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    while left:
        n = min(left, _BLOCK)
        drawn = rng.standard_normal(n, dtype=np.float32) * np.float32(weight.std) if weight.std else np.ones(n, "f4")
        yield drawn.astype(dtype)
        left -= n


class _Graph:
    """Collects nodes and small constants; every method returns the name of what it made."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.weights: list[_Weight] = []
        self.scope = ""

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = f"{self.scope}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out or f"{name}_output"], name=name, **attributes))
        return out or f"{name}_output"

    def ints(self, *values: int) -> str:
        name = "ints_" + "_".join(str(v).replace("-", "m") for v in values)
        self.constants.setdefault(name, helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def scalar(self, name: str, value: float, element: int) -> str:
        self.constants.setdefault(name, helper.make_tensor(name, element, [], [value]))
        return name

    def weight(self, name: str, dims: tuple[int, int] | tuple[int], std: float, source: str = "") -> str:
        self.weights.append(_Weight(name, dims, std, source))
        return name

    def linear(self, x: str, name: str, k: int, n: int, gain: float = 1.0) -> str:
        return self.op("MatMul", x, self.weight(f"{name}.weight", (k, n), gain / math.sqrt(k)))

    def cast(self, x: str, element: int) -> str:
        """Cast between float32 and the model's type; nothing in a float32 model, as in real exports."""
        return x if self.spec.dtype == "float32" else self.op("Cast", x, to=element)

    def norm(self, x: str, name: str) -> str:
        wide = self.cast(x, TensorProto.FLOAT)
        square = self.op("Pow", wide, self.scalar("two", 2.0, TensorProto.FLOAT))
        mean = self.op("ReduceMean", square, self.ints(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.scalar("epsilon", 1e-5, TensorProto.FLOAT)))
        unit = self.cast(self.op("Div", wide, root), _ELEMENT[self.spec.dtype])
        return self.op("Mul", unit, self.weight(f"{name}.weight", (self.spec.hidden,), 0.0))

    def size(self, x: str, axis: int) -> str:
        return self.op("Gather", self.op("Shape", x), self.ints(axis), axis=0)


def _mask(g: _Graph, past: str) -> str:
    """Additive mask [B or 1, 1, S, T] from causality and attention_mask."""
    element = _ELEMENT[g.spec.dtype]
    length = g.size("input_ids", 1)
    total = g.op("Add", past, length)
    zero, one = g.scalar("zero_i", 0, TensorProto.INT64), g.scalar("one_i", 1, TensorProto.INT64)
    key = g.op("Range", zero, g.op("Squeeze", total), one)
    query = g.op("Unsqueeze", g.op("Add", g.op("Range", zero, g.op("Squeeze", length), one), past), g.ints(1))
    keep = g.op("LessOrEqual", key, query)
    if g.spec.mask:
        real = g.op("Cast", g.op("Unsqueeze", "attention_mask", g.ints(1, 2)), to=TensorProto.BOOL)
        keep = g.op("And", keep, real)
    lowest = float(np.finfo(_NUMPY[g.spec.dtype]).min)
    mask = g.op("Where", keep, g.scalar("zero_f", 0.0, element), g.scalar("lowest", lowest, element))
    return mask if g.spec.mask else g.op("Unsqueeze", mask, g.ints(0, 1))


def _rotary(g: _Graph, past: str) -> tuple[str, str]:
    """Cosine and sine [B or 1, 1, S, D] of the rotary angles."""
    spec = g.spec
    position = "position_ids"
    if not spec.positions:
        zero, one = g.scalar("zero_i", 0, TensorProto.INT64), g.scalar("one_i", 1, TensorProto.INT64)
        steps = g.op("Range", zero, g.op("Squeeze", g.size("input_ids", 1)), one)
        position = g.op("Unsqueeze", g.op("Add", steps, past), g.ints(0))
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float32) / spec.head_dim
    frequency = (1.0 / spec.rope_theta**exponent).astype(np.float32)
    g.constants["inv_freq"] = onnx.numpy_helper.from_array(frequency, "inv_freq")
    angle = g.op("Mul", g.op("Cast", g.op("Unsqueeze", position, g.ints(1, 3)), to=TensorProto.FLOAT), "inv_freq")
    both = g.op("Concat", angle, angle, axis=-1)
    element = _ELEMENT[spec.dtype]
    return g.cast(g.op("Cos", both), element), g.cast(g.op("Sin", both), element)


def _rotate(g: _Graph, x: str, rotary: tuple[str, str]) -> str:
    half = g.spec.head_dim // 2
    low = g.op("Slice", x, g.ints(0), g.ints(half), g.ints(3))
    high = g.op("Slice", x, g.ints(half), g.ints(2 * half), g.ints(3))
    turned = g.op("Concat", g.op("Neg", high), low, axis=-1)
    return g.op("Add", g.op("Mul", x, rotary[0]), g.op("Mul", turned, rotary[1]))


def _heads(g: _Graph, x: str, heads: int) -> str:
    return g.op("Transpose", g.op("Reshape", x, g.ints(0, -1, heads, g.spec.head_dim)), perm=[0, 2, 1, 3])


def _repeat(g: _Graph, x: str) -> str:
    """[B, kv_heads, T, D] -> [B, heads, T, D]."""
    spec = g.spec
    if spec.heads == spec.kv_heads:
        return x
    ones = g.op("Expand", g.op("Unsqueeze", x, g.ints(2)), g.ints(1, 1, spec.heads // spec.kv_heads, 1, 1))
    shape = g.op("Concat", g.size(x, 0), g.ints(spec.heads), g.size(x, 2), g.ints(spec.head_dim), axis=0)
    return g.op("Reshape", ones, shape)


def _layer(g: _Graph, x: str, index: int, rotary: tuple[str, str], mask: str) -> str:
    spec, name = g.spec, f"model.layers.{index}"
    g.scope = "/" + name.replace(".", "/")
    element, wide = _ELEMENT[spec.dtype], spec.heads * spec.head_dim
    narrow = spec.kv_heads * spec.head_dim
    residual_gain = 1.0 / math.sqrt(2 * spec.layers)
    h = g.norm(x, f"{name}.input_layernorm")
    q = _rotate(g, _heads(g, g.linear(h, f"{name}.self_attn.q_proj", spec.hidden, wide), spec.heads), rotary)
    k = _rotate(g, _heads(g, g.linear(h, f"{name}.self_attn.k_proj", spec.hidden, narrow), spec.kv_heads), rotary)
    v = _heads(g, g.linear(h, f"{name}.self_attn.v_proj", spec.hidden, narrow), spec.kv_heads)
    if spec.cache:
        k = g.op("Concat", f"past_key_values.{index}.key", k, axis=2, out=f"present.{index}.key")
        v = g.op("Concat", f"past_key_values.{index}.value", v, axis=2, out=f"present.{index}.value")
    scores = g.op("MatMul", q, g.op("Transpose", _repeat(g, k), perm=[0, 1, 3, 2]))
    scores = g.op("Mul", scores, g.scalar("attention_scale", spec.head_dim**-0.5, element))
    weights = g.op("Softmax", g.op("Add", scores, mask), axis=-1)
    mixed = g.op("Transpose", g.op("MatMul", weights, _repeat(g, v)), perm=[0, 2, 1, 3])
    mixed = g.op("Reshape", mixed, g.ints(0, -1, wide))
    x = g.op("Add", x, g.linear(mixed, f"{name}.self_attn.o_proj", wide, spec.hidden, residual_gain))
    h = g.norm(x, f"{name}.post_attention_layernorm")
    gate = g.linear(h, f"{name}.mlp.gate_proj", spec.hidden, spec.ffn)
    up = g.linear(h, f"{name}.mlp.up_proj", spec.hidden, spec.ffn)
    act = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    return g.op("Add", x, g.linear(act, f"{name}.mlp.down_proj", spec.ffn, spec.hidden, residual_gain))


def _graph(spec: DecoderSpec) -> tuple[_Graph, onnx.ModelProto]:
    """The whole model without its large weights, which `_Graph.weights` lists in file order."""
    g = _Graph(spec)
    element, ids = _ELEMENT[spec.dtype], TensorProto.INT64
    past_dims: list[str | int | None] = ["batch_size", spec.kv_heads, "past_sequence_length", spec.head_dim]
    total = "total_sequence_length" if spec.cache else "sequence_length"
    inputs = [helper.make_tensor_value_info("input_ids", ids, ["batch_size", "sequence_length"])]
    if spec.mask:
        inputs.append(helper.make_tensor_value_info("attention_mask", ids, ["batch_size", total]))
    if spec.positions:
        inputs.append(helper.make_tensor_value_info("position_ids", ids, ["batch_size", "sequence_length"]))
    kept = 1 if spec.last_token_only else "sequence_length"
    outputs = [helper.make_tensor_value_info("logits", element, ["batch_size", kept, spec.vocab])]
    for i in range(spec.layers if spec.cache else 0):
        for part in ("key", "value"):
            inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{part}", element, past_dims))
            dims: list[str | int | None] = [*past_dims[:2], total, spec.head_dim]
            outputs.append(helper.make_tensor_value_info(f"present.{i}.{part}", element, dims))
    g.scope = "/model"
    past = g.size("past_key_values.0.key", 2) if spec.cache else g.ints(0)
    mask, rotary = _mask(g, past), _rotary(g, past)
    embedding = g.weight("model.embed_tokens.weight", (spec.vocab, spec.hidden), _LOGIT_STD / math.sqrt(spec.hidden))
    x = g.op("Gather", embedding, "input_ids", axis=0)
    for i in range(spec.layers):
        x = _layer(g, x, i, rotary, mask)
    g.scope = "/model"
    x = g.norm(x, "model.norm")
    if spec.last_token_only:
        x = g.op("Slice", x, g.ints(-1), g.ints(np.iinfo(np.int64).max), g.ints(1))
    g.scope = "/lm_head"
    if spec.tied == "transpose":
        classifier = g.op("Transpose", embedding, perm=[1, 0])
    else:
        source = embedding if spec.tied == "duplicate" else ""
        classifier = g.weight("lm_head.weight", (spec.hidden, spec.vocab), _LOGIT_STD / math.sqrt(spec.hidden), source)
    g.op("MatMul", x, classifier, out="logits")
    graph = helper.make_graph(g.nodes, "reference_decoder", inputs, outputs, list(g.constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", spec.opset)], ir_version=9)
    model.producer_name = "reference_decoder"
    return g, model


def parameters(spec: DecoderSpec) -> int:
    """Number of stored weight elements (a duplicated tied weight counts twice)."""
    return sum(math.prod(w.dims) for w in _graph(spec)[0].weights)


def build(spec: DecoderSpec) -> onnx.ModelProto:
    """Return the model with its weights inline; for small ones."""
    g, model = _graph(spec)
    for weight in g.weights:
        array = np.concatenate(list(_blocks(weight, spec))).reshape(weight.dims)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, weight.name))
    return model


def write(spec: DecoderSpec, path: Path) -> Path:
    """Write `path` and `path` + ".data" (all weights external), block by block; return `path`."""
    g, model = _graph(spec)
    data = path.with_name(path.name + ".data")
    with data.open("wb") as file:
        for weight in g.weights:
            file.write(b"\0" * (-file.tell() % _ALIGN))
            tensor = model.graph.initializer.add(name=weight.name, data_type=_ELEMENT[spec.dtype], dims=weight.dims)
            tensor.data_location = TensorProto.EXTERNAL
            start = file.tell()
            for block in _blocks(weight, spec):
                file.write(block.astype(block.dtype.newbyteorder("<"), copy=False).tobytes())
            for key, value in (("location", data.name), ("offset", start), ("length", file.tell() - start)):
                tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def main() -> None:
    """Write one decoder from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--dtype", choices=sorted(_ELEMENT), default="float32")
    parser.add_argument("--tied", choices=("no", "transpose", "duplicate"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    spec = replace(PRESETS[args.preset], dtype=args.dtype, tied=args.tied, seed=args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(spec, args.out)
    print(f"{args.out}: {parameters(spec):,} parameters")


if __name__ == "__main__":
    main()
