"""Packed weights with many codes at their zero points."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxslim_llm.custom_ops import kernels
from onnxslim_llm.custom_ops.packed import PackedScheme
from onnxslim_llm.custom_ops.packing import pack_bits

Array = np.ndarray[Any, Any]


def thin_weight(scheme: PackedScheme, density: float, seed: int = 0) -> Array:
    """Codes that are not at their zero point with a probability of `density`, and by no accident."""
    rng = np.random.default_rng(seed)
    n, blocks, width = scheme.columns, -(-scheme.rows // scheme.block), 2**scheme.bits
    zeros = np.full((n, blocks), width // 2, np.uint8)
    if not scheme.symmetric:
        zeros = rng.integers(0, width, (n, blocks), np.uint8)
    codes = rng.integers(1, width, (n, blocks, scheme.block), np.uint8) + zeros[:, :, None]
    codes &= np.uint8(width - 1)
    codes = np.where(rng.random(codes.shape) < density, codes, zeros[:, :, None])
    scales = (0.005 + 0.01 * rng.random((n, blocks))).astype(np.float16)
    stored_zeros = None if scheme.symmetric else pack_bits(zeros, scheme.bits)
    return kernels.pack(scheme, pack_bits(codes, scheme.bits), scales, stored_zeros)
