"""The way of a model, in one direction: open, cleanup, quantize, lower, save, verify, report, publish."""

from __future__ import annotations

from onnxslim_llm.compiler.flow import CompileResult, compile  # noqa: A004 (the verb that the product is about)
from onnxslim_llm.compiler.inspection import Inspection, inspect
from onnxslim_llm.compiler.progress import Progress, Silent

__all__ = ["CompileResult", "Inspection", "Progress", "Silent", "compile", "inspect"]
