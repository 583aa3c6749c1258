"""Write a GGUF file of the architecture llama: its header from sizes, its tensors from the caller."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class LlamaSizes:
    """What the header of a GGUF file says of a Llama.

    Attributes:
        hidden: width of the residual stream.
        intermediate: neurons of a feed-forward layer.
        head_dim: width of a head.
        vocab: tokens.
        context: most tokens of a text.
        epsilon: of RMSNorm.
        theta: base of the rotary embedding.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    epsilon: float
    theta: float


@contextmanager
def llama_gguf(path: Path, sizes: LlamaSizes, file_type: int, words: Sequence[str] = ()) -> Iterator[GGUFWriter]:
    """Yield a writer that takes tensors; the file appears when all of them are written.

    Args:
        path: of the file.
        sizes: see there.
        file_type: the mixture of types, one of `gguf.LlamaFileType`.
        words: the text of each token. Without them the file has no vocabulary and is fed token ids.
    """
    import gguf

    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama", use_temp_file=True)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    if sizes.head_dim * sizes.heads != sizes.hidden:
        writer.add_key_length(sizes.head_dim)
        writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(sizes.epsilon)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(sizes.theta)
    writer.add_vocab_size(sizes.vocab)
    writer.add_file_type(file_type)
    _add_vocabulary(writer, words)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def _add_vocabulary(writer: GGUFWriter, words: Sequence[str]) -> None:
    """Add words that are never merged, and nothing before or after a text."""
    import gguf

    if not words:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * len(words))
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
