"""The tricks, one a file: every pass that the compiler ships, listed explicitly.

Third parties add theirs through the entry point group `onnxslim_llm.passes`.
"""

from __future__ import annotations

from onnxslim_llm.rewrite.passes import Pass

__all__ = ["PASSES"]

PASSES: tuple[type[Pass], ...] = ()
