"""The runtime part: compiled code with a numpy reference, and nothing of the compiler.

``layout`` says what a block-quantized weight is, ``quantize`` makes one, ``reference`` is its specification and
``native`` binds the C++ library that does the same work at memory speed. Importing this package loads no library.
"""

from __future__ import annotations

__all__ = ["available", "describe"]


def available() -> bool:
    """Whether the compiled library can be used here; without it the numpy reference does the work, slowly."""
    from onnxslim_llm.custom_ops import native

    return native.load().library is not None


def describe() -> str:
    """One line for people: the instruction set in use, or why the compiled library is not."""
    from onnxslim_llm.custom_ops import native

    loaded = native.load()
    return f"native library, {native.best_isa()}" if loaded.library is not None else loaded.reason
