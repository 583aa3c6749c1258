"""llama.cpp's products in the kernel benchmark: the same numbers as numpy gives."""

from __future__ import annotations

import numpy as np
import pytest
from ggml_library import GgmlLibrary
from ggml_peers import GGML_PEERS, GgmlPeer, usable_folder

# ggml rounds activations to int8 with a scale per 32: at most 1/254 of each block's largest. Over 512 products that
# are independent the sum's error is a few thousandths of the largest result.
INT8_ACTIVATIONS = 0.02


def dequantized_q4_0(data: np.ndarray, n: int, k: int) -> np.ndarray:
    """[n, k] float32: code i of a block is the low half of byte i, or the high half of byte i - 16."""
    blocks = data.reshape(n, k // 32, 18)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).astype(np.float32) - 8
    return (codes * scales).reshape(n, k)


@pytest.mark.parametrize("rows", [1, 40])
def test_product_of_q4_0(rows: int) -> None:
    folder = usable_folder()
    if folder is None:
        pytest.skip("needs a working llama-cpp-python")
    k, n = 512, 64
    peer = GgmlPeer(GgmlLibrary(folder), "llama_q4_0", k, n, rows, copies=2, threads=1)
    assert peer.seconds() > 0
    x = np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32)
    wanted = x @ dequantized_q4_0(GGML_PEERS["llama_q4_0"].random(k, n), n, k).T
    assert np.abs(peer.result() - wanted).max() <= INT8_ACTIVATIONS * np.abs(wanted).max()
