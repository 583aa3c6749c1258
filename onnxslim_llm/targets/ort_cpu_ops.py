"""ONNX Runtime on CPUs, with the project's own operators."""

from __future__ import annotations

from onnxslim_llm.targets.base import Target
from onnxslim_llm.targets.ort_cpu import ORT_CPU

__all__ = ["ORT_CPU_OPS"]


def _lowering() -> str:
    """What our operators do not do, ONNX Runtime's own do as on ort-cpu.

    Residuals are left to the products in front of them, which add them for nothing: as many nodes as with norms that
    take them in, and any norm will do.
    """
    text = ORT_CPU.lowering.replace("{runtime_operators=false}", "")
    text = text.replace("lower_contrib_ops,", 'lower_contrib_ops{skip_norms="none"},')
    return text.replace("lower_ort_cpu,", "lower_ort_cpu_ops, lower_ort_cpu,")


ORT_CPU_OPS = Target(
    name="ort-cpu-ops",
    description=(
        "ONNX Runtime on CPUs with the operator library of this package (`register_custom_ops`): the fastest products "
        "of few-bit weights, which ONNX Runtime maps from the file in their final layout. `--target ort-cpu` converts "
        "an artifact back for machines without the library."
    ),
    package="onnxruntime",
    lowering=_lowering(),
    domains=("", "com.microsoft", "onnxslim_llm.ops"),
    min_opset=1,
    weight_bits=(2, 3, 4, 8),
    needs_operators=True,
    qdq=ORT_CPU.qdq,
)
