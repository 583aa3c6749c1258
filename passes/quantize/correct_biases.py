"""Take the mean error of quantized products back in their biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import BLOCK_MATMUL, job_of
from onnxslim_llm.ir.weights import ArrayWeight, Weight, constant, weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.bias_job import BiasJob, shift_of
from onnxslim_llm.passes.quantize.codes.calibrated_job import CalibratedJob
from onnxslim_llm.passes.quantize.codes.columns import columns_of
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.passes.quantize.codes.trial import coded, lost
from onnxslim_llm.products.output_bias import add_vector, added_vector
from onnxslim_llm.products.owned_weights import Constants
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage
from onnxslim_llm.stats.statistics import StoredMoments

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["CorrectBiases"]

#: Columns on which a new addition has to show that it is worth it.
_COLUMNS = 1024
_FLOAT16 = int(TensorProto.FLOAT16)


@dataclass(frozen=True)
class CorrectBiases(Pass):
    """Add what few-bit weights lose on average to the bias behind their product.

    With the mean m of the input, m (W - W^) is the mean error of the product. Each column is corrected only if that
    lowers its error on samples of the calibration data that were held out. The bias is computed while the model is
    written, which quantizes its weight once more. Codes that were chosen with calibration data leave little to correct;
    codes of the least error of the weights do.

    Before:
        p = onnxslim_llm.BlockMatMul <block_size, scale_type> (x, W_q4, W_scale, W_zp)
        y = Add (p, b)
    After:
        p = onnxslim_llm.BlockMatMul <block_size, scale_type> (x, W_q4, W_scale, W_zp)
        y = Add (p, b_corrected)

    Skips when:
        - there is no bias, and `add` is off or the error would not fall by `min_gain`;
        - no calibration data reach the product;
        - its codes are no recorded work of one weight: stored already, packed with others, or in two planes.

    Attributes:
        add: Add a bias where there is none: N floats, 8 / K of the bytes of 4-bit codes, and an addition of [N] for
            each token, which is a node of its own where the target's product takes no bias.
        min_gain: Share by which the error on the held-out samples must fall for that.
    """

    name: ClassVar[str] = "correct_biases"
    group: ClassVar[str] = "quantize"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.COMPENSATE

    add: bool = False
    min_gain: float = 0.05

    @property
    def wants_statistics(self) -> bool:
        """It works from the means of the inputs."""
        return True

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data.

        Raises:
            UsageError: There are none.
        """
        context.need_statistics("biases are corrected by calibration data: there are none", self.name)

    def apply(self, model: Model, context: Context) -> Change:
        """Correct the biases of the top graph."""
        change = Change()
        constants = Constants(model)
        for node in [n for n in model.graph.nodes if BLOCK_MATMUL.is_call(n)]:
            reason = self._correct(model, context, constants, node, change)
            if reason:
                change.skip(node.name or node.outputs[0].name, reason)
        return change

    def _correct(self, model: Model, context: Context, constants: Constants, node: gs.Node, change: Change) -> str:
        """Correct one product, or return why it stays."""
        job = job_of(node)
        if type(job) not in (QuantizeJob, CalibratedJob):
            return "its codes are no recorded work of one weight"
        assert isinstance(job, QuantizeJob)
        assert context.statistics is not None
        moments = context.statistics.of_weight(job.where())
        if moments is None or moments.size != job.rows:
            return "no calibration data reach it"
        found = added_vector(constants, node, job.columns)
        if found is not None:
            add, index = found
            tensor = add.inputs[index]
            corrected = _corrected(weight_of(tensor), job, moments)
            if len(tensor.outputs) == 1 and id(tensor) not in constants.outputs:
                tensor.values = corrected
            else:
                add.inputs[index] = constant(model.fresh_name(f"{tensor.name}_corrected"), corrected)
        elif not self.add:
            return "it has no bias, and `add` is off"
        else:
            share = _share_of_mean(job, moments)
            if share < self.min_gain:
                return f"a bias would take {100 * share:.1f} % of the error on samples that were held out"
            kind = np.dtype(np.float16 if node.attrs["scale_type"] == _FLOAT16 else np.float32)
            add_vector(model, node, _corrected(ArrayWeight(np.zeros(job.columns, kind)), job, moments))
        change.sites.append(node.name or node.outputs[0].name)
        return ""


def _corrected(bias: Weight, job: QuantizeJob, moments: StoredMoments) -> Weight:
    return derive(BiasJob(bias, job, moments))[0]


def _share_of_mean(job: QuantizeJob, moments: StoredMoments) -> float:
    """Return which part of the squared error on the held-out samples a bias would take away, on some columns."""
    columns = columns_of(job.inputs[0], job.k_axis, _COLUMNS)
    change = columns - coded(columns, job.scheme, moments)
    collected = moments.load()
    assert collected.held.gram is not None, moments.file
    error = lost(change, collected.held.gram.astype(np.float32))
    _, gains = shift_of(change.T, collected.fit, collected.held)
    return float(gains.sum()) / error if error > 0 else 0.0
