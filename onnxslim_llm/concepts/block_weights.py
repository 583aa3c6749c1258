"""Block-quantized weights as a concept: what stands between `quantize_weights` and a target's lowering.

The logical weight is W[K, N], K being the axis that a product sums over. Its columns are cut into blocks of `block`
rows, each with its scale (and zero point): W = (codes - zero_point) * scale. An embedding table [V, D] is W with K = D
and N = V, so that a table and a classifier that share their weight share codes, too.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.concepts.concept import Concept
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.jobs import DerivedWeight, Tile, WeightJob

__all__ = ["BLOCK_GATHER", "BLOCK_MATMUL", "Accuracy", "BlockJob", "BlockLayout", "Method", "WeightScheme", "job_of"]

BlockLayout = Literal["blocked_kn", "blocked_nk", "nbits"]
"""Byte layouts; the table in custom_ops/layout.py specifies them.

blocked_kn: DequantizeLinear on [K, N], axis 0. blocked_nk: DequantizeLinear on [N, K], axis 1.
nbits: com.microsoft MatMulNBits and GatherBlockQuantized.
"""

#: A[..., K] times the weight. `scale_type` is the element type (TensorProto.DataType) that is computed in: that of A.
BLOCK_MATMUL = Concept(
    "BlockMatMul",
    """<block_size, scale_type> (A, codes, scales, zero_points) => (Y) {
        s = Cast <to: int = @scale_type> (scales)
        W = DequantizeLinear <axis = 0, block_size: int = @block_size> (codes, s, zero_points)
        Y = MatMul (A, W)
    }""",
    min_opset=21,
)

#: Columns of the weight, i.e. rows of the table [N, K], at `indices`.
BLOCK_GATHER = Concept(
    "BlockGather",
    """<block_size, scale_type> (indices, codes, scales, zero_points) => (Y) {
        s = Cast <to: int = @scale_type> (scales)
        W = DequantizeLinear <axis = 0, block_size: int = @block_size> (codes, s, zero_points)
        T = Transpose <perm = [1, 0]> (W)
        Y = Gather <axis = 0> (T, indices)
    }""",
    min_opset=21,
)


Accuracy = Literal["exact", "bf16", "int8"]
"""Activations in float32, in bfloat16 together with the weights, or in int8 per block."""

Method = Literal["rtn", "search", "hqq", "calibrated"]


@dataclass(frozen=True)
class WeightScheme:
    """How a weight is coded.

    Attributes:
        bits: Width of a code: 2, 3, 4 or 8.
        block: Rows of W[K, N] that share a scale: 16, 32, 64, 128 or 256; 0 for one scale per column.
        symmetric: No zero points; the whole range [-2^(bits-1), 2^(bits-1) - 1] is used.
        method: "rtn" takes the range of each block; "search" and "hqq" look for better scales, see custom_ops.quantize.
            "calibrated" takes the way with the least error in what the product computes on calibration data.
        scale_type: Type that scales are stored in.
        accuracy: The least precision of products with the weight; None leaves it to the lowering.
    """

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    method: Method = "search"
    scale_type: Literal["float32", "float16"] = "float32"
    accuracy: Accuracy | None = None

    def block_rows(self, rows: int) -> int:
        """Rows of a block of a weight with K = `rows`."""
        return self.block or rows

    def block_count(self, rows: int) -> int:
        """KB, the blocks of a column; the last one may be short."""
        return -(-rows // self.block_rows(rows))


class BlockJob(WeightJob):
    """Recorded quantization of one weight.

    Its outputs are codes, scales and, if the scheme is not symmetric, zero points, laid out as `layout` says.

    Attributes:
        scheme: How the weight is coded.
        rows: K.
        columns: N.
        layout: Order of the bytes.
        stored_block: Rows that share a stored scale. More scales than the scheme has are stored, repeated, if a layout
            cannot hold blocks as long as a column.
        accuracy: The least precision of products with it, as they had it in the source model or as the scheme asks for;
            None leaves it to the lowering.
    """

    scheme: WeightScheme
    rows: int
    columns: int
    layout: BlockLayout
    stored_block: int
    accuracy: Accuracy | None = None

    @abstractmethod
    def with_layout(self, layout: BlockLayout) -> BlockJob:
        """Return the same work with its result in another layout: the same numbers in another order."""

    def columns_of(self, tile: Tile) -> tuple[int, int]:
        """Return the range of columns that a tile computes where the layout is "nbits": one column after the other."""
        return tile.start, tile.stop

    @property
    def pieces(self) -> tuple[BlockJob, ...]:
        """The weights that lie side by side in this one; itself where it is a single one."""
        return (self,)

    def preview(self, start: int, stop: int) -> NDArray[np.float32] | None:
        """Return columns [start, stop) of the weight [K, n] before they are coded, to estimate errors from.

        None where that would take as long as the whole work, or where the work is made of several pieces.
        """
        return None

    @property
    def identity(self) -> Any:
        """Equal for jobs that give the same numbers, in whatever layout."""
        return self.with_layout("blocked_kn").key


def job_of(call: gs.Node) -> BlockJob | None:
    """Return the recorded work behind the codes of a BlockMatMul or BlockGather; None if they are plain numbers."""
    codes = call.inputs[1]
    weight = weight_of(codes) if isinstance(codes, gs.Constant) else None
    job = weight.job if isinstance(weight, DerivedWeight) else None
    return job if isinstance(job, BlockJob) else None
