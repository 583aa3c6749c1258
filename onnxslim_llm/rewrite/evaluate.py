"""Evaluating single nodes with onnx's reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["FOLDABLE", "GENERATORS", "NodeEvaluator", "evaluate"]

#: Operators that are computed at compile time: deterministic, without state, and the same in every runtime up to
#: rounding. Quantization (QuantizeLinear, DequantizeLinear, ...) is not among them: folding it would undo it.
FOLDABLE = frozenset(
    word
    for line in (
        "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr",
        "BitwiseXor Cast CastLike Ceil Clip Compress Concat ConstantOfShape Cos Cosh CumSum Div Equal Erf Exp",
        "Expand Flatten Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual Identity IsInf IsNaN",
        "Less LessOrEqual Log MatMul Max Mean Min Mod Mul Neg NonZero Not OneHot Or Pad Pow Range Reciprocal",
        "ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Round ScatterElements ScatterND",
        "Sigmoid Sign Sin Sinh Slice Softmax Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK Transpose Trilu",
        "Unsqueeze Where Xor",
    )
    for word in line.split()
)

#: Those whose results can be much larger than their inputs.
GENERATORS = frozenset(["ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Tile"])

#: The reference implementation lacks their forms with axes as an attribute (before opset 13).
_AXES_ATTRIBUTE: dict[str, Callable[..., NDArray[Any]]] = {"Squeeze": np.squeeze, "Unsqueeze": np.expand_dims}


class NodeEvaluator:
    """A node of the standard domain, ready to be computed any number of times.

    Args:
        node: The node; without subgraphs.
        opset: Version of the standard domain.
    """

    def __init__(self, node: gs.Node, opset: int) -> None:
        self._node = node
        self._opset = opset
        self._present = [not tensor.is_empty() for tensor in node.inputs]
        self._runner: Any = None

    def __call__(self, inputs: Sequence[NDArray[Any] | None]) -> list[NDArray[Any]] | None:
        """Return the outputs for these inputs (None where one is omitted), or None where they cannot be computed."""
        node = self._node
        if node.op in _AXES_ATTRIBUTE and "axes" in node.attrs and inputs[0] is not None:
            return [_AXES_ATTRIBUTE[node.op](inputs[0], tuple(node.attrs["axes"]))]
        try:
            if self._runner is None:
                self._runner = self._prepare()
            # Results that the standard leaves open (a float that no int can hold) are the runtime's affair.
            with np.errstate(invalid="raise", over="ignore", divide="ignore", under="ignore"):
                results = self._runner.run(None, {f"i{k}": v for k, v in enumerate(inputs) if v is not None})
        except Exception:  # whatever an implementation in numpy may raise: then the runtime computes the node
            return None
        return [np.asarray(result) for result in results]

    def _prepare(self) -> Any:
        from onnx.reference import ReferenceEvaluator  # only models with something to evaluate need it

        node = self._node
        names = [f"i{k}" if present else "" for k, present in enumerate(self._present)]
        outputs = [f"o{k}" for k in range(len(node.outputs))]
        attributes = {}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Constant):
                value = onnx.numpy_helper.from_array(weight_of(value).load(), value.name)
            attributes[name] = value
        proto = onnx.helper.make_node(node.op, names, outputs, domain=normal_domain(node.domain), **attributes)
        return ReferenceEvaluator(proto, opsets={"": self._opset})


def evaluate(node: gs.Node, inputs: Sequence[NDArray[Any] | None], opset: int) -> list[NDArray[Any]] | None:
    """Return the outputs of a node of the standard domain, or None where the reference implementation cannot.

    Args:
        node: The node; without subgraphs.
        inputs: Its inputs; None where one is omitted.
        opset: Version of the standard domain.
    """
    return NodeEvaluator(node, opset)(inputs)
