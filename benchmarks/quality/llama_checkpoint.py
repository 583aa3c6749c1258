"""A Llama's weights as arrays, from a Hugging Face folder or a llama2.c checkpoint, and the tokenizer of the latter."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SAFETENSORS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_HF_PARTS = dict(
    zip(
        _PARTS,
        (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))),
        strict=True,
    )
)


@dataclass(frozen=True)
class LlamaCheckpoint:
    """Sizes and weights; matrices are [outputs, inputs], named as GGUF names them.

    The rows of q and k are in the order in which rotary embedding turns neighbours against each other.

    Attributes:
        tensors: token_embd, output_norm, output (unless tied) and blk.N.{attn_norm, attn_q, ..., ffn_down}.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    epsilon: float
    theta: float
    tensors: dict[str, Array] = field(repr=False)


def read_hugging_face(folder: Path) -> LlamaCheckpoint:
    """Read config.json and model.safetensors of a LlamaForCausalLM.

    Rotary embedding there turns the halves of a head against each other; GGUF turns neighbours. The rows of q and k
    are put in the order in which both are the same.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)

    def tensor(name: str) -> Array:
        entry = header[name]
        begin, end = (start + offset for offset in entry["data_offsets"])
        stored = np.frombuffer(raw[begin:end], _SAFETENSORS[entry["dtype"]])
        return stored.reshape(entry["shape"]).astype(np.float32)

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = {"token_embd": tensor("model.embed_tokens.weight"), "output_norm": tensor("model.norm.weight")}
    if "lm_head.weight" in header and not config.get("tie_word_embeddings"):
        tensors["output"] = tensor("lm_head.weight")
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        tensors[f"blk.{i}.attn_norm"] = tensor(prefix + "input_layernorm.weight")
        tensors[f"blk.{i}.ffn_norm"] = tensor(prefix + "post_attention_layernorm.weight")
        for part, name in _HF_PARTS.items():
            tensors[f"blk.{i}.{part}"] = tensor(f"{prefix}{name}.weight")
        for part, count in (("attn_q", heads), ("attn_k", kv_heads)):
            tensors[f"blk.{i}.{part}"] = _pairs_from_halves(tensors[f"blk.{i}.{part}"], count)
    return LlamaCheckpoint(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        epsilon=config["rms_norm_eps"],
        theta=config["rope_theta"],
        tensors=tensors,
    )


def _pairs_from_halves(weight: Array, heads: int) -> Array:
    """Rows of each head (0, 1, ... n/2, n/2 + 1, ...) -> (0, n/2, 1, n/2 + 1, ...)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_llama2c(path: Path) -> LlamaCheckpoint:
    """Read a llama2.c checkpoint: seven little-endian int32 sizes, then float32 tensors by kind, all layers together.

    Raises:
        ValueError: its length does not fit its sizes.
    """
    raw = path.read_bytes()
    hidden, intermediate, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", raw)
    kv = hidden // heads * kv_heads
    rope = (context, hidden // heads // 2)
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd", (abs(vocab), hidden)),
        ("attn_norm", (layers, hidden)),
        ("attn_q", (layers, hidden, hidden)),
        ("attn_k", (layers, kv, hidden)),
        ("attn_v", (layers, kv, hidden)),
        ("attn_output", (layers, hidden, hidden)),
        ("ffn_norm", (layers, hidden)),
        ("ffn_gate", (layers, intermediate, hidden)),
        ("ffn_down", (layers, hidden, intermediate)),
        ("ffn_up", (layers, intermediate, hidden)),
        ("output_norm", (hidden,)),
        ("", rope),
        ("", rope),
        *([("output", (-vocab, hidden))] if vocab < 0 else []),
    ]
    values = np.frombuffer(raw, "<f4", offset=28)
    if len(values) != sum(int(np.prod(shape)) for _, shape in shapes):
        raise ValueError(f"{path} is no llama2.c checkpoint of its own sizes")
    tensors: dict[str, Array] = {}
    at = 0
    for name, shape in shapes:
        array = values[at : at + int(np.prod(shape))].reshape(shape)
        at += array.size
        if name in (*_PARTS, "attn_norm", "ffn_norm"):
            tensors |= {f"blk.{i}.{name}": array[i] for i in range(layers)}
        elif name:
            tensors[name] = array
    return LlamaCheckpoint(hidden, intermediate, layers, heads, kv_heads, abs(vocab), context, 1e-5, 10000.0, tensors)


class Llama2cTokenizer:
    """Byte pair encoding with scores as llama2.c stores it: of all neighbours, the pair with the best score merges."""

    BEGIN = 1

    def __init__(self, path: Path, vocab: int) -> None:
        raw = path.read_bytes()
        self._pieces: list[bytes] = []
        self._scores: list[float] = []
        at = 4
        for _ in range(vocab):
            score, length = struct.unpack_from("<fi", raw, at)
            self._scores.append(score)
            self._pieces.append(raw[at + 8 : at + 8 + length])
            at += 8 + length
        self._ids = {piece: i for i, piece in reversed(list(enumerate(self._pieces)))}
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, a start token first and a space before its first word, as the models were trained."""
        ids = [self.BEGIN]
        for word in _words(" " + text):
            if word not in self._words:
                self._words[word] = self._merged(word)
            ids += self._words[word]
        return ids

    def _merged(self, word: str) -> list[int]:
        ids: list[int] = []
        for character in word:
            piece = character.encode()
            # A character that is no token is spelled in bytes; their tokens follow <unk>, <s> and </s>.
            ids += [self._ids[piece]] if piece in self._ids else [byte + 3 for byte in piece]
        while True:
            pairs = [
                (self._scores[token], -i, token)
                for i in range(len(ids) - 1)
                if (token := self._ids.get(self._pieces[ids[i]] + self._pieces[ids[i + 1]])) is not None
            ]
            if not pairs:
                return ids
            _, at, token = max(pairs)
            ids[-at : -at + 2] = [token]


def _words(text: str) -> Iterator[str]:
    """Cut before every space that follows something else: no token of these vocabularies goes across."""
    start = 0
    for i in range(1, len(text)):
        if text[i] == " " and text[i - 1] != " ":
            yield text[start:i]
            start = i
    yield text[start:]
