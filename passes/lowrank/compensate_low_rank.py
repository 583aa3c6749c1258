"""Give quantized products back, by two thin matrices, the part of their error that matters most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import BLOCK_MATMUL, BlockJob, job_of
from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.weights import constant
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage
from onnxslim_llm.stats.curvature import output_error
from onnxslim_llm.stats.whitened import Alike, low_rank, whitened_by

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context
    from onnxslim_llm.stats.statistics import Collected, Statistics

__all__ = ["CompensateLowRank"]

Array = NDArray[Any]

_LARGEST_CODE = 127
_FLOAT16 = 10  # TensorProto.FLOAT16


@dataclass(frozen=True)
class CompensateLowRank(Pass):
    """Add the largest directions of the error of quantized weights back as a product of two int8 matrices of low rank.

    E = W - W_q is approximated by A B so that the error in the output, weighed by the inputs of calibration data, is
    least (QERA, EoRA: the truncated decomposition of E whitened by H = X^T X). The products of a layer are kept only
    where they make the output's error smaller on samples that were held out. Rounding without data leaves errors that a
    few directions dominate; compensated codes (method=calibrated) leave hardly any, and then more bits are worth more.

    Before:
        y = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (x, W_q4, W_scale, W_zp)
    After:
        p = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (x, W_q4, W_scale, W_zp)
        A = DequantizeLinear <axis = 1> (A_q8, A_scale)
        t = MatMul (x, A)
        B = DequantizeLinear <axis = 0> (B_q8, B_scale)
        c = MatMul (t, B)
        y = Add (p, c)

    Skips when:
        - the error falls by less than `min_gain` on samples that were held out, or without data in the weight;
        - the rank is more than half of the smaller side: that would be no thin matrix;
        - the codes are in two planes, or come from a model that was quantized before: the source weight is not known;
        - the calibration data are zero where it reads them.

    Attributes:
        rank: Columns of the first and rows of the second matrix.
        min_gain: Share of the squared error that must go.
    """

    name: ClassVar[str] = "compensate_low_rank"
    group: ClassVar[str] = "lowrank"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.COMPENSATE

    rank: int = 16
    min_gain: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank must be 1 or more, not {self.rank}", where=self.name)
        if not 0 <= self.min_gain < 1:
            raise UsageError(f"min_gain must lie between 0 and 1, not {self.min_gain}", where=self.name)

    def apply(self, model: Model, context: Context) -> Change:
        """Quantize each weight, and add the products where they help."""
        change = Change(detail={"layers": []})
        for graph, call in list(calls(model, BLOCK_MATMUL)):
            job = job_of(call)
            where = job.where() if job is not None else call.name
            reason = self._unusable(job) or self._compensate(model, graph, call, job, context.statistics, change)
            if reason:
                change.skip(where, reason)
        return change

    def _unusable(self, job: BlockJob | None) -> str:
        if job is None:
            return "its codes were there before: the source weight is not known"
        if self.rank > min(job.rows, job.columns) // 2:
            return f"rank {self.rank} is more than half of {min(job.rows, job.columns)}"
        return ""

    def _compensate(
        self,
        model: Model,
        graph: gs.Graph,
        call: gs.Node,
        job: BlockJob | None,
        statistics: Statistics | None,
        change: Change,
    ) -> str:
        """Add the products of a layer, or return why not."""
        assert job is not None
        source = job.preview(0, job.columns)
        if source is None:
            return "the source weight is not at hand, or is stored in two planes"
        error = source - _decoded(job)
        moments = statistics.of_weight(job.where()) if statistics is not None else None
        known = moments.load() if moments is not None and moments.size == job.rows else None
        whitening = Alike() if known is None or known.fit.gram is None else whitened_by(known.fit.gram)
        if whitening is None:
            return "the calibration data are zero where it reads them"
        found = low_rank(error, whitening, self.rank)
        left, left_scale = _codes(found.left, axis=1)
        right, right_scale = _codes(found.right, axis=0)
        rest = error - (left * left_scale).astype(np.float32) @ (right * right_scale[:, None]).astype(np.float32)
        before, after = (_squared(e, known) for e in (error, rest))
        if not after < before * (1 - self.min_gain):
            ratio = after / before if before else 1.0
            return f"the error becomes {ratio:.3f} times what it is"
        scale_type = np.float16 if call.attrs["scale_type"] == _FLOAT16 else np.float32
        factors = ((left, left_scale.astype(scale_type)), (right, right_scale.astype(scale_type)))
        _add_products(model, graph, call, *factors)
        change.sites.append(job.where())
        added = left.size + right.size + 2 * self.rank * np.dtype(scale_type).itemsize
        change.detail["layers"].append({"name": job.where(), "error_ratio": round(after / before, 4), "bytes": added})
        return ""


def _decoded(job: BlockJob) -> Array:
    """Return what the codes stand for [K, N], float32; the work is done now, and again when the model is saved."""
    plain = job.with_layout("blocked_kn")
    codes, scales, *zeros = (weight.load() for weight in derive(plain))
    value = codes.astype(np.float32)
    block, rows = plain.stored_block, plain.rows
    if zeros:
        value -= np.repeat(zeros[0].astype(np.float32), block, axis=0)[:rows]
    result: Array = value * np.repeat(scales.astype(np.float32), block, axis=0)[:rows]
    return result


def _codes(matrix: Array, axis: int) -> tuple[Array, Array]:
    """Return int8 codes and the scale of each direction: of columns (axis 1) or rows (0)."""
    largest = np.abs(matrix).max(axis=1 - axis)
    # Through float16, so that the same scales hold where activations have this type.
    scale = np.maximum(largest / _LARGEST_CODE, np.finfo(np.float16).tiny).astype(np.float16).astype(np.float32)
    wide = scale if axis == 1 else scale[:, None]
    return np.clip(np.rint(matrix / wide), -_LARGEST_CODE, _LARGEST_CODE).astype(np.int8), scale


def _squared(error: Array, known: Collected | None) -> float:
    if known is None:
        return float(np.square(error, dtype=np.float64).sum())
    assert known.held.gram is not None
    return float(output_error(error.astype(np.float32), known.held.gram).sum())


def _add_products(
    model: Model, graph: gs.Graph, call: gs.Node, left: tuple[Array, Array], right: tuple[Array, Array]
) -> None:
    result = call.outputs[0]
    op = Builder(model, f"{call.name}/compensation")
    product = gs.Variable(model.fresh_name(f"{result.name}/quantized"), result.dtype, result.shape)
    call.outputs[0] = product
    value: Any = call.inputs[0]
    for (codes, scale), axis, hint in ((left, 1, "A"), (right, 0, "B")):
        parts = (("q8", codes), ("scale", scale))
        stored = [constant(model.fresh_name(f"{call.name}/{hint}_{part}"), array) for part, array in parts]
        value = op.MatMul(value, op.DequantizeLinear(*stored, axis=axis))
    op.Add(product, value)
    op.nodes[-1].outputs[0] = result
    place = next(i for i, node in enumerate(graph.nodes) if node is call)
    graph.nodes[place + 1 : place + 1] = op.nodes
