"""What passes ask of tuning; knows no torch, so that passes can speak of it without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["CodeTuner", "Codes", "Tunable", "TuningPlan", "TuningResult"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Codes:
    """A coded weight W[K, N] = scales * (codes - zeros), blocks running along K.

    Attributes:
        codes: [K, N] uint8.
        scales: [KB, N] float32, as they are stored.
        zeros: [KB, N] uint8.
    """

    codes: Array
    scales: Array
    zeros: Array


@dataclass(frozen=True)
class Tunable:
    """A weight whose numbers may change.

    Attributes:
        name: For messages.
        tensor: Name of the initializer that holds the codes: all its readers are products and look-ups of this weight.
        start: Its numbers as they are.
        block: Rows that share a scale.
        levels: The largest code.
        half: Whether scales are stored in float16.
        floats: [K, N]: what the codes stand for, before they were rounded; zeros among them stay zeros. None: the codes
            stay as they are.
    """

    name: str
    tensor: str
    start: Codes
    block: int
    levels: int
    half: bool
    floats: Array | None


@dataclass(frozen=True)
class TuningPlan:
    """How long and how fast.

    Attributes:
        steps: Of the optimizer, at most.
        batch: Windows of a step.
        window: Tokens of a window, where the model does not fix them.
        code_rate: Largest change of a code before it is rounded, in a step.
        scale_rate: Largest relative change of a scale in a step.
        replaced: Share of a window's tokens that are replaced by others of the text, anew in every step.
        seed: Of the order of windows and of the replacements.
    """

    steps: int
    batch: int
    window: int
    code_rate: float
    scale_rate: float
    replaced: float
    seed: int


@dataclass(frozen=True)
class TuningResult:
    """What came out.

    Attributes:
        weights: In the order in which they were given.
        kl_before, kl_after: Mean KL divergence of the model to its source on held-out windows, in nats; equal where
            nothing was better than the start.
        steps: Steps that were done.
        best_step: After which of them the result was taken; 0 is the start.
        tokens: Of windows that were learned from, and that were held out.
        curve: (step, KL divergence on the held-out windows).
    """

    weights: Sequence[Codes]
    kl_before: float
    kl_after: float
    steps: int
    best_step: int
    tokens: tuple[int, int]
    curve: Sequence[tuple[int, float]] = field(default=())


class CodeTuner(Protocol):
    """Tunes coded weights so that the model's answers come closer to those of its source."""

    def tune(self, model: Model, weights: Sequence[Tunable], plan: TuningPlan) -> TuningResult:
        """Return better numbers for the weights, or the given ones.

        Args:
            model: The model between two passes.
            weights: What may change.
            plan: How.

        Raises:
            UsageError: The data are no text, or too short to hold some out.
            ModelError: An operator on the way has no gradient (it is named), or the model is no decoder.
            ResourceError: Torch is not installed.
        """
        ...
