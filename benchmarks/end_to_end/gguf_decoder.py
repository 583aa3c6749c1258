"""A random decoder as GGUF in Q4_0, token embedding and classifier included: 4 bits and a float16 for 32 weights."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gguf_llama import LlamaSizes, llama_gguf

if TYPE_CHECKING:
    from reference_decoder import DecoderSpec

Array = np.ndarray[Any, Any]

CONTEXT, EPSILON = 4096, 1e-5
BLOCK = 32
CODES = 16  # bytes of a block behind its scale
CODE_STD = math.sqrt((16**2 - 1) / 12)  # of codes that are equally likely


def random_q4_0(rows: int, columns: int, std: float, seed: int) -> Array:
    """Bytes [rows, columns / 32 * 18] of a weight whose elements have the standard deviation `std`.

    Speed does not depend on values, so they are drawn as codes; scales of ordinary size keep activations finite.
    """
    rng = np.random.default_rng(seed)
    blocks = np.empty((rows, columns // BLOCK, 2 + CODES), np.uint8)
    blocks[..., 2:] = rng.integers(0, 256, (rows, columns // BLOCK, CODES), dtype=np.uint8)
    scales = (std / CODE_STD) * (0.8 + 0.4 * rng.random((rows, columns // BLOCK)))
    blocks[..., :2] = scales.astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def tensors(spec: DecoderSpec) -> list[tuple[str, int, int, float]]:
    """Name, rows, columns and standard deviation of each matrix, as llama.cpp's architecture "llama" has them."""
    hidden, narrow = spec.hidden, spec.kv_heads * spec.head_dim
    wide = spec.heads * spec.head_dim
    gain = 1 / math.sqrt(2 * spec.layers)
    logits = 2.5 / math.sqrt(hidden)
    found = [("token_embd.weight", spec.vocab, hidden, logits)]
    for i in range(spec.layers):
        found += [
            (f"blk.{i}.attn_q.weight", wide, hidden, hidden**-0.5),
            (f"blk.{i}.attn_k.weight", narrow, hidden, hidden**-0.5),
            (f"blk.{i}.attn_v.weight", narrow, hidden, hidden**-0.5),
            (f"blk.{i}.attn_output.weight", hidden, wide, gain * wide**-0.5),
            (f"blk.{i}.ffn_gate.weight", spec.ffn, hidden, hidden**-0.5),
            (f"blk.{i}.ffn_up.weight", spec.ffn, hidden, hidden**-0.5),
            (f"blk.{i}.ffn_down.weight", hidden, spec.ffn, gain * spec.ffn**-0.5),
        ]
    if spec.tied == "no":
        found.append(("output.weight", spec.vocab, hidden, logits))
    return found


def write_gguf(spec: DecoderSpec, path: Path) -> Path:
    """Write the decoder; llama.cpp uses the embedding as the classifier if there is no other."""
    import gguf

    sizes = LlamaSizes(
        hidden=spec.hidden,
        intermediate=spec.ffn,
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab=spec.vocab,
        context=CONTEXT,
        epsilon=EPSILON,
        theta=spec.rope_theta,
    )
    norms = [f"blk.{i}.{part}_norm.weight" for i in range(spec.layers) for part in ("attn", "ffn")]
    with llama_gguf(path, sizes, gguf.LlamaFileType.MOSTLY_Q4_0) as writer:
        for name in [*norms, "output_norm.weight"]:
            writer.add_tensor(name, np.ones(spec.hidden, np.float32))
        for seed, (name, rows, columns, std) in enumerate(tensors(spec), spec.seed):
            data = random_q4_0(rows, columns, std, seed)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    return path
