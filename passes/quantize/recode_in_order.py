"""Choose the codes of quantized weights once more, product after product, for inputs as coded weights make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.codes.coded_sites import coded_sites
from onnxslim_llm.passes.quantize.codes.recode import CodedWeight, InOrder
from onnxslim_llm.passes.quantize.codes.tuned_job import TunedJob
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["RecodeInOrder"]


@dataclass(frozen=True)
class RecodeInOrder(Pass):
    """Choose codes once more, one product after the other, so that each makes up for the errors of all before it.

    The source runs on the calibration data twice, side by side: as it is, and with the codes that are chosen so far.
    What a product's input has become is what its weight is coded for; what its output should be is that of the source.
    Where the output is added to another tensor, as to the residual stream, their sum should be that of the source. A
    column keeps the codes it had where samples that were held out say that they are better. The format does not
    change, nor does a byte of the size. Codes, a byte for each weight, are held in memory until they are written.

    Before:
        Y = onnxslim_llm.BlockMatMul <block_size, scale_type> (X, W_q4, W_scale, W_zp)
    After:
        Y = onnxslim_llm.BlockMatMul <block_size, scale_type> (X, W_q4_in_order, W_scale_in_order, W_zp_in_order)

    Skips when:
        - there are no calibration data, not even text that the model has written itself for the coding of weights;
        - the weight is a table of look-ups, a tied one, too: nothing comes before it;
        - another pass has changed it: rotated, folded, pruned, split;
        - the codes are no recorded work of one weight: stored already, packed with others; or they were tuned;
        - products in a branch read them;
        - the calibration data have fewer than eight rows for each channel of its input;
        - the held-out samples are no better in any column.
    """

    name: ClassVar[str] = "recode_in_order"
    group: ClassVar[str] = "quantize"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.COMPENSATE

    @property
    def wants_statistics(self) -> bool:
        """The first choice of codes works from them."""
        return True

    @property
    def takes_own_text(self) -> bool:
        """Whatever the weights were coded by will do, and nothing where they were coded without data."""
        return True

    @property
    def minds_cost(self) -> bool:
        """It asks for no statistics that the coding of weights does not want."""
        return True

    def apply(self, model: Model, context: Context) -> Change:
        """Choose the codes of what products of the top graph read.

        Raises:
            ModelError: The source does not run, with its own weights or with coded ones.
            UsageError: The data do not fit it.
        """
        change = Change()
        weights: dict[str, CodedWeight] = {}
        for site in coded_sites(model, change):
            if context.replayer is None or context.statistics is None:
                change.skip(site.job.where(), "there are no calibration data")
            elif isinstance(site.job, TunedJob):
                change.skip(site.job.where(), "its codes were tuned")
            else:
                weights.setdefault(site.job.where(), CodedWeight([])).sites.append(site)
        if not weights:
            return change
        assert context.replayer is not None
        assert context.statistics is not None
        known = {context.statistics.origin_of(name): entry for name, entry in weights.items()} | weights
        context.replayer.replay(InOrder(known, context.replayer.threads))
        recoded = {}
        for name, entry in weights.items():
            if not entry.columns:
                table = "it is a table: nothing comes before it" if entry.looked_up else "no data reach it"
                change.skip(name, entry.reason or table)
                continue
            assert entry.coded is not None
            for site in entry.sites:
                for constant, weight in zip(
                    site.constants, derive(TunedJob.part_of(site.job, entry.coded)), strict=True
                ):
                    constant.values = weight
            change.sites.append(name)
            recoded[name] = [entry.columns, entry.coded.codes.shape[1]]
        change.detail["columns"] = recoded
        return change
