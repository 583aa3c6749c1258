"""Standard ONNX only: for any runtime that knows opset 21."""

from __future__ import annotations

from onnxslim_llm.targets.base import Target
from onnxslim_llm.targets.qdq_tables import PORTABLE_RULES

__all__ = ["PORTABLE"]

PORTABLE = Target(
    name="portable",
    description=(
        "Standard ai.onnx operators only, for any ONNX runtime. Few-bit weights are blocked DequantizeLinear nodes, "
        "which ONNX Runtime fuses with their products into int4 and int8 kernels when it loads the model."
    ),
    package="onnxruntime",
    lowering="raise_block_weights, lower_standard_ops, lower_portable, deduplicate_initializers",
    domains=("",),
    min_opset=1,
    weight_bits=(2, 4, 8),
    fast_bits=(4, 8),
    # ONNX Runtime's own default, spelled out because verification must see what deployment gives: activations of fused
    # products are rounded to int8 per block. "1" would compute in float32: exact, but half as fast with 4 bits and far
    # slower with 8, for which there is no float kernel.
    session_config={"session.qdq_matmulnbits_accuracy_level": "4"},
    qdq=PORTABLE_RULES,
)
