"""What a family of the zoo is: an architecture, its tiny configuration and what must be fused in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "BASE",
    "CONTEXT",
    "EXPORTERS",
    "GQA",
    "HEADS",
    "HIDDEN",
    "KV_HEADS",
    "LAYERS",
    "VOCAB",
    "WINDOW",
    "Family",
    "Sites",
]

Kind = Literal["decoder", "encoder", "encoder-decoder"]

LAYERS, HIDDEN, HEADS, KV_HEADS, VOCAB, CONTEXT = 2, 64, 4, 2, 300, 256
WINDOW = 8  # shorter than every tested text, so that a rule that forgets the window shows

#: The exporters that take a kind of model.
EXPORTERS: dict[Kind, tuple[str, ...]] = {
    "decoder": ("optimum", "optimum-eager", "dynamo", "dynamo-cache", "script", "genai"),
    "encoder": ("optimum", "optimum-eager", "dynamo", "script"),
    "encoder-decoder": ("optimum", "optimum-eager", "dynamo", "script"),
}
_SPLIT = ("encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged")
_PARTS: dict[tuple[Kind, str], tuple[str, ...]] = {
    ("encoder-decoder", "optimum"): _SPLIT,
    ("encoder-decoder", "optimum-eager"): _SPLIT,
}

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA: dict[str, Any] = {**BASE, "num_key_value_heads": KV_HEADS}


@dataclass(frozen=True)
class Sites:
    """Numbers of places in a graph that a fusion is for."""

    attentions: int
    norms: int
    rotaries: int


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: in test ids, file names and tables.
        model: class in `transformers`, whose configuration class is known to it.
        config: its arguments; everything else is the class's default.
        kind: what goes in and out.
        task: Optimum's name of the task, with a cache where there is one.
        note: what is special in the graph.
        norms: normalizations in the graph, of decoders and encoders.
        rotaries: rotary embeddings in the graph.
        layer_nodes: largest number of nodes that one more layer may add to Optimum's export, compiled for ONNX Runtime;
            0 if it is not checked.
        gaps: exporters whose export is not fused completely yet, and what is left.
        exported_by: exporters that are tried; none for all that take its kind.
        refused: exporters that cannot export it, and a part of what they say.
    """

    name: str
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "decoder"
    task: str = "text-generation-with-past"
    note: str = ""
    norms: int = 2 * LAYERS + 1
    rotaries: int = 0
    layer_nodes: int = 0
    gaps: Mapping[str, str] = field(default_factory=dict)
    exported_by: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def exporters(self) -> tuple[str, ...]:
        """The exporters that are tried."""
        return self.exported_by or EXPORTERS[self.kind]

    def parts(self, exporter: str) -> tuple[str, ...]:
        """The names of the ONNX files that `exporter` writes, without their suffix."""
        return _PARTS.get((self.kind, exporter), ("model",))

    def sites(self, part: str) -> Sites:
        """What must be fused in the file `part`."""
        if self.kind != "encoder-decoder":
            return Sites(attentions=LAYERS, norms=self.norms, rotaries=self.rotaries)
        encoder = Sites(attentions=LAYERS, norms=2 * LAYERS + 1, rotaries=0)
        decoder = Sites(attentions=2 * LAYERS, norms=3 * LAYERS + 1, rotaries=0)
        if part.startswith("encoder"):
            return encoder
        if part.endswith("merged"):  # an If: the decoder without and with a cache
            return Sites(2 * decoder.attentions, 2 * decoder.norms, 0)
        if part.startswith("decoder"):
            return decoder
        return Sites(encoder.attentions + decoder.attentions, encoder.norms + decoder.norms, 0)
