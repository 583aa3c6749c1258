"""Choose the codes of quantized weights once more, product after product, for inputs as coded weights make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnxslim_llm.errors import UsageError
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
        - the weight is a table of look-ups, a tied one, too: nothing comes before it;
        - another pass has changed it: rotated, folded, pruned, split;
        - the codes are no recorded work of one weight: stored already, packed with others; or they were tuned;
        - products in a branch read them;
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

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data.

        Raises:
            UsageError: There are none.
        """
        if context.replayer is None:
            todo = "give --calib FILE or --calib self (text sampled from the model) to a compile"
            raise UsageError(
                "codes are chosen in order on calibration data: there are none", where=self.name, todo=todo
            )

    def apply(self, model: Model, context: Context) -> Change:
        """Choose the codes of what products of the top graph read.

        Raises:
            ModelError: The source does not run, with its own weights or with coded ones.
            UsageError: The data do not fit it.
        """
        change = Change()
        weights: dict[str, CodedWeight] = {}
        for site in coded_sites(model, change):
            if isinstance(site.job, TunedJob):
                change.skip(site.job.where(), "its codes were tuned")
            else:
                weights.setdefault(site.job.where(), CodedWeight([])).sites.append(site)
        if not weights:
            return change
        assert context.replayer is not None
        origin = context.statistics.origin_of if context.statistics is not None else str
        known = {origin(name): entry for name, entry in weights.items()} | weights
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
