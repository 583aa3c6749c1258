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

__all__ = ["FOLDABLE", "GENERATORS", "evaluate"]

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


def evaluate(node: gs.Node, inputs: Sequence[NDArray[Any] | None], opset: int) -> list[NDArray[Any]] | None:
    """Return the outputs of a node of the standard domain, or None where the reference implementation cannot.

    Args:
        node: The node; without subgraphs.
        inputs: Its inputs; None where one is omitted.
        opset: Version of the standard domain.
    """
    from onnx.reference import ReferenceEvaluator  # only models with something to fold need it

    if node.op in _AXES_ATTRIBUTE and "axes" in node.attrs and inputs[0] is not None:
        return [_AXES_ATTRIBUTE[node.op](inputs[0], tuple(node.attrs["axes"]))]
    names = [f"i{k}" if value is not None else "" for k, value in enumerate(inputs)]
    outputs = [f"o{k}" for k in range(len(node.outputs))]
    attributes = {}
    for name, value in node.attrs.items():
        if isinstance(value, gs.Constant):
            value = onnx.numpy_helper.from_array(weight_of(value).load(), value.name)
        attributes[name] = value
    try:
        proto = onnx.helper.make_node(node.op, names, outputs, domain=normal_domain(node.domain), **attributes)
        runner = ReferenceEvaluator(proto, opsets={"": opset})
        # Results that the standard leaves open (a float that no int can hold) are the runtime's affair.
        with np.errstate(invalid="raise", over="ignore", divide="ignore", under="ignore"):
            results = runner.run(None, {n: v for n, v in zip(names, inputs, strict=True) if v is not None})
    except Exception:  # whatever an implementation in numpy may raise: then the runtime computes the node
        return None
    return [np.asarray(result) for result in results]
