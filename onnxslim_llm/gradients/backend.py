"""Torch, or an error that names the extra: the other modules of this package import it from here."""

from __future__ import annotations

from onnxslim_llm.errors import ResourceError

try:
    import torch
except ImportError as error:
    raise ResourceError(
        "gradients need torch, which is not installed",
        where=str(error),
        todo="pip install 'onnxslim-llm[gradients]'",
    ) from error

__all__ = ["torch"]
