"""What HTP computes on integers, measured with onnxruntime-qnn 2.7.0 (htp_arch 75), 2026-11-21."""

from __future__ import annotations

from onnxslim_llm.targets.qdq_rules import QdqRules, QuantizedOp
from onnxslim_llm.targets.qdq_tables import ELEMENTWISE, MOVEMENTS, PRODUCTS

__all__ = ["HTP_RULES"]

#: The scale of a norm has the activations' type: int8 beside uint16 is refused (error 3110), and so is an int32 bias.
#: Biases in float are taken.
_NORMS = {
    "LayerNormalization": QuantizedOp(inputs=(0, 1)),
    "RMSNormalization": QuantizedOp(inputs=(0, 1)),
}
_NO_KERNEL = frozenset(["Erf"])

HTP_RULES = QdqRules(
    {name: rule for name, rule in {**PRODUCTS, **MOVEMENTS, **ELEMENTWISE, **_NORMS}.items() if name not in _NO_KERNEL},
    ("uint8", "uint16"),
    ("int8",),  # int4 with a scale per channel: see htp_lint.INT4
    blocked_weights=("int4", "int8"),
    blocked_activation_bits=16,  # with 8 they are refused
    min_opset=21,
)
