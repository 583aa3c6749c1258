"""Products on integers whose inputs are rounded when they come: no calibration data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.opset import convert_opset
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import ViewWeight
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.qdq.channel_job import ChannelJob
from onnxslim_llm.passes.qdq.nodes import QdqNode, find_nodes, weight_axis
from onnxslim_llm.rewrite.edit import Builder, detach, inherit_metadata, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.targets.qdq_tables import PRODUCT_RULES

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["QuantizeDynamically"]

#: ai.onnx that brought DynamicQuantizeLinear.
_MIN_OPSET = 11


@dataclass(frozen=True)
class QuantizeDynamically(Pass):
    """Multiply 8-bit weights with inputs that are rounded to 8 bits, by the range of each run, when they come.

    ONNX Runtime fuses the form into one kernel. An input that several products read is rounded once. Weights have a
    scale per output channel. The pass works on the target's operators: compiles run it after the lowering.

    Before:
        Y = MatMul (X, W)
    After:
        x, x_scale, x_zero_point = DynamicQuantizeLinear (X)
        sum = MatMulInteger (x, W_q8, x_zero_point)
        exact = Cast <to = 1> (sum)
        scale = Mul (x_scale, W_scale)
        Y = Mul (exact, scale)

    Skips when:
        - the node's name matches `exclude`;
        - its weight is computed, is quantized already, or has more than two dimensions;
        - its weight or its input is not float32;
        - Gemm transposes its input or scales its product, or its bias is computed;
        - sums of its products may leave int32;
        - it lies in a subgraph.

    Attributes:
        exclude: Regular expressions; nodes whose name has a match stay float.
    """

    name: ClassVar[str] = "quantize_dynamically"
    group: ClassVar[str] = "qdq"
    lossless: ClassVar[bool] = False
    after_lowering: ClassVar[bool] = True

    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._patterns()

    def requires(self, model: Model, context: Context) -> None:
        """Check that the target rounds inputs itself.

        Raises:
            UsageError: It computes on integers with ranges that are known beforehand, or not at all.
        """
        if context.target is None:
            return
        rule = None if context.target.qdq is None else context.target.qdq.rule_of("", "MatMul")
        if rule is None or rule.quantized_result:
            what = f"target '{context.target.name}' cannot choose ranges while it runs"
            raise UsageError(what, where=self.name, todo="use quantize_activations (recipe w8a8), or --target ort-cpu")

    def apply(self, model: Model, context: Context) -> Change:
        """Replace the products.

        Raises:
            ModelError: The model cannot be converted to an opset that has the operators.
        """
        change = Change()
        infer_shapes(model)
        found = find_nodes(model, PRODUCT_RULES, weights=True, exclude=self._patterns(), change=change)
        nodes = [item for item in found if self._fits(item, change)]
        if not nodes:
            return change
        if (model.opset() or 0) < _MIN_OPSET:
            convert_opset(model, _MIN_OPSET)
            change.detail["converted_to_opset"] = _MIN_OPSET
        change.sites += [item.label for item in nodes]
        _Replacement(model).replace(nodes)
        change.detail["products"] = len(nodes)
        return change

    def _fits(self, item: QdqNode, change: Change) -> bool:
        if item.weight is None or 0 not in item.inputs:
            change.skip(item.label, "it is quantized already")
            return False
        if item.weight.onnx_dtype != TensorProto.FLOAT or item.node.inputs[0].dtype == np.float16:
            change.skip(item.label, "ai.onnx rounds float32 only while it runs")
            return False
        return True

    def _patterns(self) -> list[re.Pattern[str]]:
        try:
            return [re.compile(pattern) for pattern in self.exclude]
        except (re.error, TypeError) as error:
            raise UsageError(f"no regular expression: {error}", where=f"{self.name}.exclude") from error


class _Replacement:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.rounded: dict[int, tuple[gs.Variable, ...]] = {}
        self.constants: dict[object, tuple[gs.Constant, ...]] = {}
        self.nodes: list[gs.Node] = []

    def replace(self, items: list[QdqNode]) -> None:
        wanted = {id(item.node): item for item in items}
        left: list[gs.Node] = []
        for node in list(self.model.graph.nodes):
            if id(node) in wanted:
                left += [producer for tensor in node.inputs[1:] for producer in tensor.inputs]
                self._replace(wanted[id(node)])
            else:
                self.nodes.append(node)
        dead = {id(node): node for node in remove_dead(left, graph_output_ids(self.model))}
        self.model.graph.nodes[:] = [node for node in self.nodes if id(node) not in dead]

    def _replace(self, item: QdqNode) -> None:
        node = item.node
        x, bias = node.inputs[0], node.inputs[2:3]
        beta = float(node.attrs.get("beta", 1.0))
        result, name = node.outputs[0], node.name
        op = Builder(self.model, item.label)
        codes, scale, zero = self._rounded(x)
        weight, weight_scale = self._weight(item)
        exact = op.Cast(op.MatMulInteger(codes, weight, zero), to=int(TensorProto.FLOAT))
        value = op.Mul(exact, op.Mul(scale, weight_scale))
        if bias and not bias[0].is_empty() and beta != 0.0:
            value = op.Add(value, bias[0] if beta == 1.0 else op.Mul(bias[0], np.float32(beta)))
        detach(node)
        op.nodes[-1].outputs[0] = result
        op.nodes[-1].name = name or op.nodes[-1].name
        inherit_metadata(node, result)
        self.nodes += op.nodes

    def _rounded(self, x: gs.Tensor) -> tuple[gs.Variable, ...]:
        if id(x) not in self.rounded:
            op = Builder(self.model, x.name)
            self.rounded[id(x)] = op.call("", "DynamicQuantizeLinear", x, _outputs=3)
            self.nodes += op.nodes
        return self.rounded[id(x)]

    def _weight(self, item: QdqNode) -> tuple[gs.Constant, ...]:
        """Return codes [K, N] and scales [N]."""
        assert item.weight is not None
        source = item.weight if weight_axis(item) == 1 else ViewWeight.transpose(item.weight)
        job = ChannelJob(source, 1, "int8", True, int(TensorProto.FLOAT), item.weight_name)
        if job.key not in self.constants:
            op = Builder(self.model, item.weight_name)
            codes, scales = derive(job)
            self.constants[job.key] = (
                op.constant(codes, f"{item.weight_name}_q8"),
                op.constant(scales, f"{item.weight_name}_scale"),
            )
        return self.constants[job.key]
