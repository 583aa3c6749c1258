"""Roles of weights are told from the graph's shape alone, whatever things are called."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.ir.roles import constant_roles
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.report.sizes import bytes_by_dtype, bytes_by_role, weight_uses

HIDDEN, FFN, VOCAB = 8, 16, 32


class Builder:
    """A decoder layer in plain operators with names that say nothing."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self._count = 0

    def op(self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: object) -> str:
        self._count += 1
        names = [f"t{self._count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0]

    def weight(self, name: str, *shape: int) -> str:
        self.weights[name] = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + len(self.weights)
        return name

    def norm(self, x: str, scale: str) -> str:
        mean = self.op("ReduceMean", self.op("Mul", x, x), keepdims=1)
        return self.op("Mul", self.op("Div", x, self.op("Sqrt", mean)), self.weight(scale, HIDDEN))

    def roles(self, output: str) -> dict[str, str]:
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "S"])
        out = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        initializers = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "g", [ids], [out], initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        self.model = from_proto(helper.make_model(graph, opset_imports=opsets))
        return {tensor.name: role for tensor, role in constant_roles(self.model)}


def decoder(b: Builder, *, tied: bool = False, bias: bool = False) -> str:
    """Embedding, one block of attention and feed-forward with residuals, norm, output layer."""
    x = b.op("Gather", b.weight("w1", VOCAB, HIDDEN), "ids")
    shape = b.op("Shape", x)  # exporters build the mask from dimensions; that is no flow of content
    mask = b.op("ConstantOfShape", shape)
    n = b.norm(x, "w2")
    q, k, v = (b.op("MatMul", n, b.weight(f"w{i}", HIDDEN, HIDDEN)) for i in (3, 4, 5))
    if bias:
        q = b.op("Add", q, b.weight("qb", HIDDEN))
    scores = b.op("Add", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), mask)
    context = b.op("MatMul", b.op("Softmax", scores), v)
    x = b.op("Add", x, b.op("MatMul", b.op("Identity", context), b.weight("w6", HIDDEN, HIDDEN)))
    n = b.norm(x, "w7")
    gate = b.op("Sigmoid", b.op("MatMul", n, b.weight("w8", HIDDEN, FFN)))
    up = b.op("MatMul", n, b.op("Transpose", b.weight("w9", FFN, HIDDEN), perm=[1, 0]))
    x = b.op("Add", x, b.op("MatMul", b.op("Mul", gate, up), b.weight("w10", FFN, HIDDEN)))
    n = b.norm(x, "w11")
    if tied:
        return b.op("MatMul", n, b.op("Transpose", "w1", perm=[1, 0]))
    return b.op("Cast", b.op("MatMul", n, b.weight("w12", HIDDEN, VOCAB)), to=TensorProto.FLOAT)


EXPECTED = {
    "w1": "embedding",
    **dict.fromkeys(["w2", "w7", "w11"], "norm"),
    **dict.fromkeys(["w3", "w4", "w5", "w6"], "attention"),
    **dict.fromkeys(["w8", "w9", "w10"], "ffn"),
    "w12": "lm_head",
}


def test_a_decoder() -> None:
    b = Builder()
    assert b.roles(decoder(b)) == EXPECTED


def test_a_tied_embedding_is_an_embedding() -> None:
    b = Builder()
    assert b.roles(decoder(b, tied=True)) == {k: v for k, v in EXPECTED.items() if k != "w12"}


def test_a_bias_belongs_to_its_matmul() -> None:
    b = Builder()
    assert b.roles(decoder(b, bias=True))["qb"] == "attention"


def test_weights_behind_dequantization_and_in_fused_operators() -> None:
    b = Builder()
    table = b.op("DequantizeLinear", b.weight("codes", VOCAB, HIDDEN), b.weight("scales", VOCAB, 1), axis=1)
    x = b.op("Gather", table, "ids")
    names = [b.weight(f"{kind}{part}", HIDDEN, HIDDEN) for kind in "qf" for part in ("", "_scales")]
    sizes = {"K": HIDDEN, "N": HIDDEN, "bits": 4, "block_size": 16}
    q = b.op("MatMulNBits", x, *names[:2], domain="com.microsoft", **sizes)
    a = b.op("GroupQueryAttention", q, q, q, domain="com.microsoft", num_heads=1, kv_num_heads=1)
    x = b.op("Add", x, b.op("MatMulNBits", b.op("Relu", a), *names[2:], domain="com.microsoft", **sizes))
    n = b.op("SimplifiedLayerNormalization", x, b.weight("g", HIDDEN), axis=-1)
    roles = b.roles(b.op("MatMul", n, b.weight("head", HIDDEN, VOCAB)))
    assert roles["codes"] == roles["scales"] == "embedding"
    assert roles["q"] == roles["q_scales"] == roles["f"] == roles["f_scales"] == "attention"
    assert roles["g"] == "norm"
    assert roles["head"] == "lm_head"


def test_rotary_tables_are_no_embedding() -> None:
    b = Builder()
    x = b.op("Gather", b.weight("table", VOCAB, HIDDEN), "ids")
    cos = b.op("Gather", b.weight("cos", 64, HIDDEN), "ids")
    q = b.op("Mul", b.op("MatMul", x, b.weight("q", HIDDEN, HIDDEN)), cos)
    roles = b.roles(b.op("MatMul", q, b.op("Transpose", q, perm=[0, 2, 1])))
    assert roles == {"table": "embedding", "cos": "other", "q": "attention"}


def test_a_shared_content_counts_once() -> None:
    b = Builder()
    b.roles(decoder(b))
    before = bytes_by_role(weight_uses(b.model))
    tensors = {tensor.name: tensor for tensor, _ in constant_roles(b.model)}
    tensors["w4"]._values = weight_of(tensors["w3"])
    uses = weight_uses(b.model)
    after = bytes_by_role(uses)
    assert list(after) == ["embedding", "attention", "ffn", "norm", "lm_head"]
    assert after == {**before, "attention": before["attention"] * 3 // 4}
    assert bytes_by_dtype(uses) == {"float": b.model.weight_bytes()}


@pytest.mark.parametrize("shape", [(0, HIDDEN), (VOCAB, 0)])
def test_empty_weights_have_a_role(shape: tuple[int, int]) -> None:
    b = Builder()
    assert b.roles(b.op("Gather", b.weight("w", *shape), "ids")) == {"w": "embedding"}
