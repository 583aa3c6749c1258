"""Rules of operators that several targets have in common."""

from __future__ import annotations

from collections.abc import Mapping

from onnxslim_llm.targets.qdq_rules import QdqRules, QuantizedOp

__all__ = [
    "ELEMENTWISE",
    "FLOAT_RESULT_PRODUCTS",
    "MOVEMENTS",
    "NORMS",
    "PORTABLE_RULES",
    "PRODUCTS",
    "PRODUCT_RULES",
    "WHOLE_GRAPH",
]


def _rules(names: str, rule: QuantizedOp) -> dict[str, QuantizedOp]:
    return dict.fromkeys(names.split(), rule)


#: Products between quantized tensors.
PRODUCTS: Mapping[str, QuantizedOp] = {
    "MatMul": QuantizedOp(weight=1),
    "Gemm": QuantizedOp(inputs=(0,), weight=1, bias=2),
    "Conv": QuantizedOp(inputs=(0,), weight=1, bias=2),
    "ConvTranspose": QuantizedOp(inputs=(0,), weight=1, bias=2),
}

#: Products with weights whose kernels read integers and write floats: nothing is rounded between them.
FLOAT_RESULT_PRODUCTS: Mapping[str, QuantizedOp] = {
    "MatMul": QuantizedOp(weight=1, needs_weight=True, quantized_result=False),
    "Gemm": QuantizedOp(inputs=(0,), weight=1, needs_weight=True, bias=2, quantized_result=False),
}

#: Operators that move data without computing.
MOVEMENTS: Mapping[str, QuantizedOp] = {
    **_rules("Concat MaxPool", QuantizedOp(same_scale=True)),
    **_rules(
        "Reshape Transpose Slice Split Squeeze Unsqueeze Flatten Identity Expand Tile "
        "Gather GatherElements GatherND DepthToSpace SpaceToDepth",
        QuantizedOp(inputs=(0,), same_scale=True),
    ),
}

#: Operators that compute element by element, or along one axis.
ELEMENTWISE: Mapping[str, QuantizedOp] = {
    **_rules(
        "Add Sub Mul Div Pow Max Min Where Relu Gelu HardSwish Elu LeakyRelu Clip Sqrt Reciprocal Neg Abs Exp Erf "
        "Sin Cos ReduceMean ReduceSum ReduceMax ReduceMin AveragePool GlobalAveragePool",
        QuantizedOp(),
    ),
    "Softmax": QuantizedOp(result_range=(0.0, 1.0)),
    "Sigmoid": QuantizedOp(result_range=(0.0, 1.0)),
    "Tanh": QuantizedOp(result_range=(-1.0, 1.0)),
}

#: Norms with a scale and a shift.
NORMS: Mapping[str, QuantizedOp] = {
    "LayerNormalization": QuantizedOp(inputs=(0,), weight=1, bias=2, per_channel=False),
    "RMSNormalization": QuantizedOp(inputs=(0,), weight=1, per_channel=False),
}

#: For runtimes on CPUs: products with weights on integers, all else in float.
PRODUCT_RULES = QdqRules(FLOAT_RESULT_PRODUCTS, ("uint8", "int8"), ("int8",))

#: For whatever reads standard ONNX: the same operators, in all types that the standard has.
PORTABLE_RULES = QdqRules(
    FLOAT_RESULT_PRODUCTS,
    ("uint8", "int8", "uint16", "int16"),
    ("int8", "int4"),
    blocked_weights=("int8", "int4"),
)

#: For processors that compute on nothing but integers; targets restrict it to what theirs has.
WHOLE_GRAPH = QdqRules(
    {**PRODUCTS, **MOVEMENTS, **ELEMENTWISE, **NORMS},
    ("uint8", "int8", "uint16", "int16"),
    ("int8", "int4"),
)
