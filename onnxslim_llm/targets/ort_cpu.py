"""ONNX Runtime on CPUs, with its own operators."""

from __future__ import annotations

from onnxslim_llm.targets.base import Target
from onnxslim_llm.targets.qdq_tables import PRODUCT_RULES

__all__ = ["ORT_CPU"]

ORT_CPU = Target(
    name="ort-cpu",
    description=(
        "ONNX Runtime on CPUs with its contrib operators: few-bit weights are MatMulNBits and GatherBlockQuantized "
        "nodes in their final layout, so that sessions open faster and with less memory than with the portable form."
    ),
    package="onnxruntime",
    lowering=(
        "raise_block_weights{runtime_operators=false}, "
        "pack_projections, lower_contrib_ops, lower_attention, cleanup, lower_ort_cpu, deduplicate_initializers"
    ),
    domains=("", "com.microsoft"),
    min_opset=1,
    weight_bits=(2, 4, 8),
    fast_bits=(4, 8),
    qdq=PRODUCT_RULES,
)
