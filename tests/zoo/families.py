"""All families of the zoo."""

from __future__ import annotations

from zoo.architecture import EXPORTERS, HEADS, HIDDEN, LAYERS, VOCAB, WINDOW, Family, Sites
from zoo.decoders import DECODERS
from zoo.encoders import ENCODER_DECODERS, ENCODERS
from zoo.more_decoders import MORE_DECODERS

__all__ = ["EXPORTERS", "FAMILIES", "HEADS", "HIDDEN", "LAYERS", "VOCAB", "WINDOW", "Family", "Sites", "family"]

FAMILIES: tuple[Family, ...] = (*DECODERS, *MORE_DECODERS, *ENCODERS, *ENCODER_DECODERS)

_BY_NAME = {entry.name: entry for entry in FAMILIES}


def family(name: str) -> Family:
    """The family of that name."""
    return _BY_NAME[name]
