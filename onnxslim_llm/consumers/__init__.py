"""Programs that read ONNX models, each of them run for real, in a process of its own.

The adapters are run by interpreters of other environments, too: they import nothing but numpy, the standard library and
the runtime that they are for.
"""

from __future__ import annotations

from onnxslim_llm.consumers.consumer import CONSUMERS, Consumer, Report, consume

__all__ = ["CONSUMERS", "Consumer", "Report", "consume"]
