"""Move codes and scales of quantized weights to where the model answers like its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxslim_llm.errors import UsageError
from onnxslim_llm.gradients.tuning import Tunable, TuningPlan
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.codes.coded_sites import CodedSite, coded_sites, is_plane
from onnxslim_llm.passes.quantize.codes.tuned_job import TunedJob, codes_of
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["TuneCodes", "tunables"]

#: Finer codes are right as they are: only their scales are tuned.
_COARSE_BITS = 4


@dataclass(frozen=True)
class TuneCodes(Pass):
    """Tune the codes and scales of quantized weights, all layers at once, until the model answers more like its source.

    The measure is the KL divergence of the answers to those of the source model, on windows of the calibration text;
    its gradient goes through the rounding as if it were not there. Every fifth window is held out: the tuned
    numbers are only taken from where these windows say that they are better, and the old ones are kept if they never
    do. The format does not change, nor does a byte of the size. A weight's numbers are held in float32, with some 24
    bytes a weight in all.

    Before:
        Y = onnxslim_llm.BlockMatMul <block_size, scale_type> (X, W_q4, W_scale, W_zp)
    After:
        Y = onnxslim_llm.BlockMatMul <block_size, scale_type> (X, W_q4_tuned, W_scale_tuned, W_zp)

    Skips when:
        - the codes are no recorded work of one weight: stored already, packed with others;
        - products in a branch read them;
        - the model has more coded weights than `max_parameters`.

    Attributes:
        steps: Of the optimizer, at most: it ends where the held-out windows do not get better any more.
        batch: Windows of a step.
        window: Tokens of a window.
        code_rate: Largest change in a step of a number before it is rounded to its code.
        scale_rate: Largest relative change in a step of a scale.
        replaced: Share of tokens that are replaced by others of the text, anew in every step: the model is to answer
            like its source to other texts, too.
        max_parameters: Models with more coded weights are left alone.
    """

    name: ClassVar[str] = "tune_codes"
    group: ClassVar[str] = "quantize"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.COMPENSATE

    steps: int = 200
    batch: int = 4
    window: int = 256
    code_rate: float = 0.003
    scale_rate: float = 0.002
    replaced: float = 0.1
    max_parameters: int = 2_000_000_000

    def __post_init__(self) -> None:
        for option in ("steps", "batch", "window"):
            if getattr(self, option) < 1:
                raise UsageError(f"{option} = {getattr(self, option)}", where=self.name, todo="give 1 or more")
        for option, most in (("code_rate", 0.5), ("scale_rate", 0.1), ("replaced", 1.0)):
            if not 0 <= getattr(self, option) <= most:
                what = f"{option} = {getattr(self, option)} is not possible"
                raise UsageError(what, where=self.name, todo=f"give 0 to {most}")

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data, and torch.

        Raises:
            UsageError: There are no calibration data.
            ResourceError: Torch is not installed.
        """
        if context.tuner is None:
            todo = "give --calib FILE or --calib self (text sampled from the model) to a compile"
            raise UsageError("codes are tuned on calibration data: there are none", where=self.name, todo=todo)
        import onnxslim_llm.gradients.backend  # noqa: F401  # says what to install

    def apply(self, model: Model, context: Context) -> Change:
        """Tune what products of the top graph read.

        Raises:
            UsageError: The calibration data are no text, or too short.
            ModelError: The model writes no text, or an operator on the way has no gradient.
        """
        change = Change()
        sites = coded_sites(model, change)
        elements = sum(site.job.rows * site.job.columns for site in sites)
        if elements > self.max_parameters:
            reason = f"{elements} coded weights, more than max_parameters = {self.max_parameters}"
            for site in sites:
                change.skip(site.job.where(), reason)
            return change
        if not sites:
            return change
        assert context.tuner is not None
        plan = TuningPlan(
            self.steps, self.batch, self.window, self.code_rate, self.scale_rate, self.replaced, context.seed
        )
        weights = [_tunable(site) for site in sites]
        result = context.tuner.tune(model, weights, plan)
        change.detail.update(
            kl_before=result.kl_before,
            kl_after=result.kl_after,
            steps=result.steps,
            best_step=result.best_step,
            tokens={"learned_from": result.tokens[0], "held_out": result.tokens[1]},
            curve=[list(point) for point in result.curve],
        )
        if not result.best_step:
            change.skip(self.name, "the held-out text got no better")
            return change
        for site, tuned in zip(sites, result.weights, strict=True):
            for constant, weight in zip(site.constants, derive(TunedJob.of(site.job, tuned)), strict=True):
                constant.values = weight
            change.sites.append(site.job.where())
        return change


def tunables(model: Model, change: Change) -> list[Tunable]:
    """Return the coded weights of a model as they would be tuned; `change` gets what is left alone.

    Raises:
        ModelError: A weight holds NaN or infinite values.
    """
    return [_tunable(site) for site in coded_sites(model, change)]


def _tunable(site: CodedSite) -> Tunable:
    job, floats = site.job, None
    if job.scheme.bits <= _COARSE_BITS and not is_plane(job):
        source = job.inputs[0].view()
        floats = np.asarray(source if job.k_axis == 0 else source.T, np.float32)
    return Tunable(
        name=job.where(),
        tensor=site.constants[0].name,
        start=codes_of(job),
        block=job.scheme.block_rows(job.rows),
        levels=(1 << job.scheme.bits) - 1,
        half=job.scheme.scale_type == "float16",
        floats=floats,
    )
