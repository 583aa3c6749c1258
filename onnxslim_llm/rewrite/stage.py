"""The stages of compression, in the only order in which each one's assumptions hold."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Stage"]


class Stage(IntEnum):
    """What a pass does to weights; passes of a later stage work on the result of those before."""

    FOLD = 1
    ROTATE = 2
    PRUNE = 3
    SPLIT = 4
    QUANTIZE = 5
    COMPENSATE = 6

    @property
    def assumption(self) -> str:
        """Why nothing of an earlier stage may come after this one."""
        return _ASSUMPTIONS[self]


_ASSUMPTIONS = {
    Stage.FOLD: "",
    Stage.ROTATE: "a rotation mixes the channels, so that scales per channel mean nothing afterwards",
    Stage.PRUNE: "what was chosen to be zero would not stay zero",
    Stage.SPLIT: "the factors of a split weight are no longer the weight that the later pass would change",
    Stage.QUANTIZE: "quantized weights are left alone by everything that changes floats",
    Stage.COMPENSATE: "the compensation was computed for the weights as they were",
}
