"""Many compiles of one model, each measured on the same text: what a byte costs in quality."""

from __future__ import annotations

from onnxslim_llm.compiler.sweep.run import SweepResult, sweep

__all__ = ["SweepResult", "sweep"]
