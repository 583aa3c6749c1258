"""Small transformers of concepts, and statistics of them; every habit of an architecture is a switch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from fusion_checks import run_all
from onnx import helper

from onnxslim_llm.concepts.activation import SWISH
from onnxslim_llm.concepts.attention import AttentionForm, call_attention
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.statistics import Statistics

__all__ = [
    *("FFN", "HEADS", "KV_HEADS", "SIZE", "VOCAB", "Habits"),
    *("assert_same_logits", "ids", "statistics_of", "transformer"),
]

Array = np.ndarray[Any, Any]

#: 48 = 4 * 12: its Hadamard matrix needs Paley's construction, as those of real hidden sizes do. Heads of 12.
SIZE, HEADS, KV_HEADS, FFN, VOCAB, LAYERS = 48, 4, 2, 80, 64, 2
_WIDTH = SIZE // HEADS

#: Logits of float32 models after products of some hundred terms in another order; QuaRot's own gate is 1e-3.
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Habits:
    """What differs between architectures.

    Attributes:
        layer_norm: Layer norms with a bias, and positions that are looked up, as in GPT-2; RMS norms otherwise.
        bias: Products have biases.
        tied: The classifier is the embedding behind a Transpose.
        uniform: The last norm has the same weight for all channels.
        cache: The attention has one.
        post_norm: A norm before each addition to the residual stream, as in Gemma 2.
        outliers: Some channels of the norms' results are much larger than the others.
        heavy: Some weights are much larger than the others.
    """

    layer_norm: bool = False
    bias: bool = False
    tied: bool = False
    uniform: bool = False
    cache: bool = False
    post_norm: bool = False
    outliers: bool = True
    heavy: bool = False


class _Maker:
    def __init__(self, habits: Habits, opset: int) -> None:
        self.habits = habits
        self.model = from_proto(helper.make_model(helper.make_graph([], "g", [], []), ir_version=10))
        self.model.set_opset("", opset)
        self.op = Builder(self.model, "t")
        self.rng = np.random.default_rng(3)
        self.inputs: list[gs.Variable] = []
        self.outputs: list[gs.Variable] = []

    def constant(self, name: str, *shape: int, mean: float = 0.0, std: float = 1.0) -> gs.Constant:
        return self.op.constant((mean + std * self.rng.standard_normal(shape)).astype(np.float32), name)

    def product(self, x: Any, name: str, rows: int, columns: int) -> Any:
        weight = self.constant(name, rows, columns, std=rows**-0.5)
        if self.habits.heavy:
            weight.values = weight.values * np.where(self.rng.random((rows, columns)) < 1 / 24, 8, 1).astype(np.float32)
        y = self.op.MatMul(x, weight)
        return self.op.Add(y, self.constant(f"{name}.bias", columns, std=0.1)) if self.habits.bias else y

    def norm(self, x: Any, name: str, uniform: bool = False) -> Any:
        scale = np.exp(0.3 * self.rng.standard_normal(SIZE)).astype(np.float32)
        if self.habits.outliers:
            scale[[3, 17]] = 9.0
        weight = self.op.constant(np.full(SIZE, 1.5, np.float32) if uniform else scale, f"{name}.weight")
        if self.habits.layer_norm:
            shift = self.constant(f"{name}.bias", SIZE, std=0.2)
            return self.op.LayerNormalization(x, weight, shift, axis=-1, epsilon=1e-5)
        return RMS_NORM.build(self.op, x, weight, epsilon=1e-5)

    def attention(self, x: Any, layer: int) -> Any:
        q = self.product(x, f"{layer}.q", SIZE, SIZE)
        k, v = (self.product(x, f"{layer}.{n}", SIZE, KV_HEADS * _WIDTH) for n in "kv")
        form = AttentionForm(causal=True, grouped=True, past=self.habits.cache, present=self.habits.cache)
        operands, results = [q, k, v], [gs.Variable(f"{layer}.mixed", np.float32)]
        if self.habits.cache:
            shape = ["B", KV_HEADS, "P", _WIDTH]
            past = [gs.Variable(f"past.{layer}.{n}", np.float32, shape) for n in ("key", "value")]
            present = [
                gs.Variable(f"present.{layer}.{n}", np.float32, ["B", KV_HEADS, "T", _WIDTH]) for n in ("key", "value")
            ]
            self.inputs += past
            self.outputs += present
            operands, results = [*operands, *past], [*results, *present]
        heads = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS}
        call = call_attention(self.model, f"{layer}.attention", form, operands, results, scale=0.3, **heads)
        self.op.nodes.append(call)
        return self.product(results[0], f"{layer}.o", SIZE, SIZE)

    def mlp(self, x: Any, layer: int) -> Any:
        gate = SWISH.build(self.op, self.product(x, f"{layer}.gate", SIZE, FFN), alpha=1.0)
        return self.product(self.op.Mul(gate, self.product(x, f"{layer}.up", SIZE, FFN)), f"{layer}.down", FFN, SIZE)

    def branch(self, x: Any, kind: str, layer: int) -> Any:
        inner = self.attention if kind == "attention" else self.mlp
        y = inner(self.norm(x, f"{layer}.{kind}.norm"), layer)
        return self.norm(y, f"{layer}.{kind}.post") if self.habits.post_norm else y

    def make(self) -> Model:
        tokens = gs.Variable("ids", np.int64, ["B", "S"])
        self.inputs.append(tokens)
        table = self.constant("embedding", VOCAB, SIZE)
        x = self.op.Gather(table, tokens)
        if self.habits.layer_norm:
            positions = gs.Variable("positions", np.int64, ["B", "S"])
            self.inputs.append(positions)
            x = self.op.Add(x, self.op.Gather(self.constant("positions.weight", 16, SIZE), positions))
        for layer in range(LAYERS):
            x = self.op.Add(x, self.branch(x, "attention", layer))
            x = self.op.Add(x, self.branch(x, "mlp", layer))
        x = self.norm(x, "norm", self.habits.uniform)
        head = (
            self.op.Transpose(table, perm=[1, 0]) if self.habits.tied else self.constant("head", SIZE, VOCAB, std=0.1)
        )
        logits = self.op.MatMul(x, head)
        logits.name = "logits"
        logits.dtype = np.dtype(np.float32)
        logits.shape = ["B", "S", VOCAB]
        self.model.graph.nodes += self.op.nodes
        self.model.graph.inputs, self.model.graph.outputs = self.inputs, [logits, *self.outputs]
        return self.model


def transformer(habits: Habits | None = None, opset: int = 21) -> Model:
    """A model of two layers; the same one for the same habits."""
    made = _Maker(habits or Habits(), opset).make()
    return from_proto(made.to_proto())


def ids(habits: Habits, rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, Array]:
    """Inputs, caches empty."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {"ids": rng.integers(0, VOCAB, (rows, length))}
    if habits.layer_norm:
        feeds["positions"] = np.tile(np.arange(length), (rows, 1))
    if habits.cache:
        empty = np.zeros((rows, KV_HEADS, 0, _WIDTH), np.float32)
        feeds |= {f"past.{layer}.{n}": empty for layer in range(LAYERS) for n in ("key", "value")}
    return feeds


def statistics_of(model: Model, habits: Habits, folder: Path) -> Statistics:
    """Moments of the inputs of all products on random tokens."""
    folder.mkdir(exist_ok=True)
    onnx.save(model.to_proto(), folder / "model.onnx")
    data = TensorCalibration(tuple(ids(habits, 4, 12, seed) for seed in range(1, 11)))
    return collect(folder / "model.onnx", "m", data, folder / "statistics")[0]


def assert_same_logits(before: Model, after: Model, feeds: Mapping[str, Array]) -> None:
    """Compare the logits in ONNX Runtime without its optimisations."""
    onnx.checker.check_model(after.to_proto())
    expected, actual = (run_all(model.to_proto(), feeds)["logits"] for model in (before, after))
    assert np.abs(expected).max() > 1  # a model of zeros would agree with anything
    assert np.abs(expected - actual).max() <= LOGIT_TOLERANCE * np.abs(expected).max()
