"""Q and DQ nodes around the nodes that are computed on integers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights import ArrayWeight, Weight, weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.qdq.channel_job import ChannelJob
from onnxslim_llm.passes.qdq.codings import Coding, Codings, float_type
from onnxslim_llm.passes.qdq.constant_jobs import LARGEST_BIAS, BiasJob, OperandJob
from onnxslim_llm.passes.qdq.nodes import QdqNode, is_dequantized, weight_axis
from onnxslim_llm.passes.qdq.scale_groups import constant_of
from onnxslim_llm.products.reads import read_weight
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.edit import Builder, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.targets.qdq_rules import QdqRules, WeightType

__all__ = ["Insertion"]


@dataclass
class Insertion:
    """Puts pairs of Q and DQ nodes into the top graph of a model.

    Attributes:
        model: The model; changed in place.
        rules: Of the target.
        codings: Of all quantized tensors.
        weight_type: Of weights that are float so far.
        pairs: How many pairs were put in.
        weights: Names of the weights that became integers.
    """

    model: Model
    rules: QdqRules
    codings: Codings
    weight_type: WeightType
    pairs: int = 0
    weights: list[str] = field(default_factory=list)
    _pairs: dict[tuple[int, Coding], gs.Variable] = field(default_factory=dict, repr=False)
    _weights: dict[Hashable, gs.Variable] = field(default_factory=dict, repr=False)
    _nodes: list[gs.Node] = field(default_factory=list, repr=False)

    def run(self, nodes: Sequence[QdqNode]) -> None:
        """Quantize the inputs, weights, biases and results of the nodes."""
        graph = self.model.graph
        wanted = {id(item.node): item for item in nodes}
        left: list[gs.Tensor] = []
        for node in list(graph.nodes):
            item = wanted.get(id(node))
            if item is None:
                self._nodes.append(node)
                continue
            step, operand = self._step(item), self._operand_step(item)
            before = list(node.inputs)
            for i in item.inputs:
                node.inputs[i] = self._operand(item, node.inputs[i])
            if item.weight is not None:
                self._weight(item, item.weight, step)
            elif step is not None and operand is not None:
                self._bias_of_operand(item, step, operand)
            left += [old for old, new in zip(before, node.inputs, strict=True) if old is not new]
            self._nodes.append(node)
            for i in item.results:
                self._result(node, i)
        producers = [node for tensor in left if isinstance(tensor, gs.Variable) for node in tensor.inputs]
        removed = remove_dead(producers, graph_output_ids(self.model))
        dead = {id(node) for node in removed}
        graph.nodes[:] = [node for node in self._nodes if id(node) not in dead]

    def _operand(self, item: QdqNode, tensor: gs.Tensor) -> gs.Variable:
        """Return what a node reads instead of a float tensor."""
        coding = self.codings.read(item, tensor)
        content = constant_of(tensor)
        if content is not None:
            return self._constant(tensor, content, coding)
        source = tensor.inputs[0] if tensor.inputs else None
        if (id(tensor), coding) in self._pairs:
            return self._pairs[id(tensor), coding]
        if source is not None and is_dequantized(tensor) and self.codings.stored(tensor) == coding:
            return tensor  # its producer's pair is the one that is wanted
        op = Builder(self.model, tensor.name)
        read = self._pair(op, tensor, coding)
        self._nodes += op.nodes
        self._pairs[id(tensor), coding] = read
        return read

    def _pair(self, op: Builder, tensor: gs.Tensor, coding: Coding) -> gs.Variable:
        scale, zero = self._parameters(op, tensor, coding)
        codes = op.QuantizeLinear(tensor, scale, zero)
        codes.dtype, codes.shape = np.dtype(coding.width.kind), tensor.shape
        read: gs.Variable = op.DequantizeLinear(codes, scale, zero)
        read.dtype, read.shape = tensor.dtype, tensor.shape
        self.pairs += 1
        return read

    def _parameters(self, op: Builder, tensor: gs.Tensor, coding: Coding) -> tuple[gs.Constant, gs.Constant]:
        scale = np.array(coding.scale, np.float16 if float_type(tensor) == TensorProto.FLOAT16 else np.float32)
        hint = tensor.name
        return op.constant(scale, f"{hint}_scale"), op.constant(coding.zero_point, f"{hint}_zero_point")

    def _constant(self, tensor: gs.Tensor, content: Weight, coding: Coding) -> gs.Variable:
        key = (id(tensor), coding)
        if key not in self._pairs:
            op = Builder(self.model, tensor.name)
            scale, zero = self._parameters(op, tensor, coding)
            width = coding.width
            (codes,) = derive(OperandJob(content, width.kind, width.grid, coding.scale, coding.zero, tensor.name))
            read = op.DequantizeLinear(op.constant(codes, f"{tensor.name}_q{width.bits}"), scale, zero)
            read.dtype, read.shape = tensor.dtype, tensor.shape
            self._nodes += op.nodes
            self._pairs[key] = read
        return self._pairs[key]

    def _result(self, node: gs.Node, index: int) -> None:
        """Round a result; the name stays with what everybody reads."""
        tensor = node.outputs[index]
        coding = self.codings.stored(tensor)
        op = Builder(self.model, tensor.name)
        exact = gs.Variable(self.model.fresh_name(f"{tensor.name}/float"), tensor.dtype, tensor.shape)
        node.outputs[index] = exact
        self._pair(op, exact, coding)
        op.nodes[-1].outputs[0] = tensor
        self._nodes += op.nodes

    def _step(self, item: QdqNode) -> np.float32 | None:
        """Return the scale of what a node's weight is multiplied with, before or without quantizing it here."""
        tensor = item.node.inputs[0]
        if 0 in item.inputs:
            return self.codings.read(item, tensor).scale
        if not is_dequantized(tensor):
            return None
        scale = constant_value(tensor.inputs[0].inputs[1])
        return np.float32(scale) if scale is not None and scale.size == 1 else None

    def _weight(self, item: QdqNode, weight: Weight, step: np.float32 | None) -> None:
        node, index = item.node, item.rule.weight
        assert index is not None
        per_channel = item.rule.per_channel and self.rules.granularity == "channel" and len(weight.shape) > 1
        axis = weight_axis(item) if per_channel else None
        bias = self._bias(item) if step is not None else None
        least = None
        if bias is not None and step is not None:
            least = _least_scale(bias, _beta(node), float(step), axis)
        scale_type = int(TensorProto.FLOAT16 if str(weight.dtype) == "float16" else TensorProto.FLOAT)
        name, symmetric = item.weight_name, self.rules.weight_symmetric
        job = ChannelJob(weight, axis, self.weight_type, symmetric, scale_type, name, least)
        codes, scales, *zeros = derive(job)
        if job.key not in self._weights:
            op = Builder(self.model, name)
            hints = (f"{name}_q{self.weight_type.lstrip('uint')}", f"{name}_scale", f"{name}_zero_point")
            made = [op.constant(w, hint) for w, hint in zip((codes, scales, *zeros), hints, strict=False)]
            read = op.DequantizeLinear(*made, axis=axis)
            read.dtype, read.shape = node.inputs[index].dtype, tuple(weight.shape)
            self._nodes += op.nodes
            self._weights[job.key] = read
            self.weights.append(name)
        node.inputs[index] = self._weights[job.key]
        if bias is not None and step is not None and item.rule.bias is not None:
            self._store_bias(node, item.rule.bias, bias, scales, step)

    def _operand_step(self, item: QdqNode) -> np.float32 | None:
        """Return the scale of a constant second operand that is coded like an activation (the scale of a norm)."""
        if 1 not in item.inputs or constant_of(item.node.inputs[1]) is None:
            return None
        return self.codings.read(item, item.node.inputs[1]).scale

    def _bias_of_operand(self, item: QdqNode, step: np.float32, operand: np.float32) -> None:
        bias = self._bias(item)
        if bias is None or item.rule.bias is None:
            return
        largest = float(np.abs(bias.view().astype(np.float64)).max(initial=0.0))
        unit = max(float(operand), largest / (float(step) * LARGEST_BIAS))
        dtype = np.float16 if str(bias.dtype) == "float16" else np.float32
        scale = ArrayWeight(np.array(unit, dtype))
        self._store_bias(item.node, item.rule.bias, bias, scale, step)

    def _bias(self, item: QdqNode) -> Weight | None:
        index = item.rule.bias
        if index is None or not self.rules.bias_integer or index >= len(item.node.inputs):
            return None
        read = read_weight(item.node.inputs[index])
        bias = None if read is None else weight_of(read.constant)
        return bias if bias is not None and len(bias.shape) == 1 else None

    def _store_bias(self, node: gs.Node, index: int, bias: Weight, scales: Weight, step: np.float32) -> None:
        name = node.inputs[index].name
        codes, units = derive(BiasJob(bias, scales, step, name, _beta(node)))
        op = Builder(self.model, name)
        made = [op.constant(codes, f"{name}_q32"), op.constant(units, f"{name}_scale")]
        read = op.DequantizeLinear(*made, axis=0 if scales.shape else None)
        read.dtype, read.shape = node.inputs[index].dtype, tuple(bias.shape)
        self._nodes += op.nodes
        node.inputs[index] = read
        node.attrs.pop("beta", None)


def _beta(node: gs.Node) -> float:
    return float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0


def _least_scale(bias: Weight, beta: float, step: float, axis: int | None) -> NDArray[np.float32]:
    """Return the scales that a weight must at least have for its bias to fit into int32."""
    least = np.abs(bias.view().astype(np.float64) * beta) / (step * LARGEST_BIAS)
    return (least if axis is not None else least.max(keepdims=True)).astype(np.float32)
