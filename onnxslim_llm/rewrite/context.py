"""What a pass may know about the compile that it is part of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxslim_llm.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxslim_llm.gradients.source import GradientSource
    from onnxslim_llm.gradients.tuning import CodeTuner
    from onnxslim_llm.rewrite.passes import Pass
    from onnxslim_llm.stats.observe import Observer
    from onnxslim_llm.stats.replay import Replayer
    from onnxslim_llm.stats.shared_ranges import SharedRanges
    from onnxslim_llm.stats.statistics import Statistics
    from onnxslim_llm.stats.token_source import TokenSource
    from onnxslim_llm.targets.base import Target
    from onnxslim_llm.targets.product_times import ProductTimer

__all__ = ["Context"]


@dataclass
class Context:
    """Surroundings of a pass.

    Attributes:
        target: Where the artifact will run; None while inspecting or testing a single pass.
        seed: Seed for everything random, so that a compile is reproducible.
        statistics: Moments of the inputs of products on calibration data; None where none were collected.
        cache_ranges: Largest magnitudes [H, D] of what the KV caches hold on sample tokens, by the name of the present
            output; None where they were not measured.
        following: The passes that come after this one: what is prepared for a quantizer depends on its options.
        observer: Runs the graph as it is on calibration data and looks at its tensors; None where there is no source
            model to take inputs from.
        shared_ranges: Where several graphs are made of the source: what the calibration of the others has said.
        gradients: Computes figures of gradients of the graph as it is, in torch; None where there is no source model.
        tuner: Tunes coded weights by the answers of the source model, in torch; None where there are no data.
        timer: Times products in the target's runtime; None where nothing is compiled.
        replayer: Runs the source beside itself with coded weights; None where there is no source model.
        tokens: Knows which tokens the user's data have; None where there is no source model.
        notes: One-line remarks for the user; passes append to it.
    """

    target: Target | None = None
    seed: int = 0
    statistics: Statistics | None = None
    cache_ranges: Mapping[str, NDArray[Any]] | None = None
    following: Sequence[Pass] = ()
    observer: Observer | None = None
    shared_ranges: SharedRanges | None = None
    gradients: GradientSource | None = None
    tuner: CodeTuner | None = None
    timer: ProductTimer | None = None
    replayer: Replayer | None = None
    tokens: TokenSource | None = None
    notes: list[str] = field(default_factory=list)

    def need_statistics(self, what: str, where: str, otherwise: str = "") -> None:
        """Check that there are calibration data.

        Args:
            what: What cannot be done without them, as a sentence.
            where: Name of the pass.
            otherwise: What else the user could do.

        Raises:
            UsageError: There are none.
        """
        if self.statistics is None:
            todo = "give --calib FILE or --calib self (text sampled from the model)"
            raise UsageError(what, where=where, todo=f"{todo}, or {otherwise}" if otherwise else todo)

    def need_gradients(self, what: str, where: str, otherwise: str = "") -> None:
        """Check that gradients can be computed.

        Args:
            what: What cannot be done without them, as a sentence.
            where: Name of the pass.
            otherwise: What else the user could do.

        Raises:
            UsageError: There is no source model to run.
            ResourceError: Torch is not installed.
        """
        if self.gradients is None:
            todo = "compile a model with calibration data"
            raise UsageError(what, where=where, todo=f"{todo}, or {otherwise}" if otherwise else todo)
        self.gradients.check()
