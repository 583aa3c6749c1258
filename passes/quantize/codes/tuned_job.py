"""The recorded work of storing codes that are known: nothing is left to choose."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import BlockLayout, WeightScheme
from onnxslim_llm.custom_ops.layout import Layout, TileBuffers
from onnxslim_llm.custom_ops.packing import unpack
from onnxslim_llm.gradients.tuning import Codes
from onnxslim_llm.ir.weights import ArrayWeight
from onnxslim_llm.ir.weights.jobs import Tile, TileOutput
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.quantize.codes.calibrated_job import CodedJob, PlaneJob
from onnxslim_llm.passes.quantize.codes.coding import spec_of
from onnxslim_llm.passes.quantize.codes.compensate import Coded
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.passes.quantize.codes.planes import plane_of

__all__ = ["TunedJob", "codes_of"]

#: Part of the fingerprint: raise it when the same numbers give other bytes.
_VERSION = 1


class TunedJob(CodedJob):
    """Store codes, scales and zero points that are known.

    Args:
        source: The weight that they stand for, as in `QuantizeJob`; and so are `k_axis`, `scheme`, `name`, `layout`.
        codes: [K, N] uint8.
        scales: [KB, N] float32, as their type holds them.
        zeros: [KB, N] uint8.
        plane: Which plane of the codes is stored; None: they are stored as they are.
        chosen: The scheme of the codes; default: that of the stored plane.
    """

    def __init__(
        self,
        source: Weight,
        k_axis: int,
        scheme: WeightScheme,
        name: str,
        codes: Weight,
        scales: Weight,
        zeros: Weight,
        layout: BlockLayout = "blocked_kn",
        plane: int | None = None,
        chosen: WeightScheme | None = None,
    ) -> None:
        super().__init__(source, k_axis, scheme, name, layout)
        self.chosen_scheme = chosen or scheme
        self.plane = plane
        self.moments, self.ridge = None, 0.0
        self.inputs = (source, codes, scales, zeros)
        self.fingerprint = f"tuned v{_VERSION} plane={plane} {self.fingerprint}"

    @classmethod
    def of(cls, job: QuantizeJob, tuned: Codes) -> TunedJob:
        """Return the work of storing other numbers than a job would choose, in its layout."""
        codes, scales, zeros = (ArrayWeight(array) for array in (tuned.codes, tuned.scales, tuned.zeros))
        return cls(job.inputs[0], job.k_axis, job.scheme, job.name, codes, scales, zeros, job.layout)

    @classmethod
    def part_of(cls, job: QuantizeJob, coded: Coded) -> TunedJob:
        """Return the work of storing what a job stores of a weight, all of it or a plane, with other codes."""
        codes, scales, zeros = (ArrayWeight(array) for array in (coded.codes, coded.scales, coded.zeros))
        plane = job.index if isinstance(job, PlaneJob) else None
        chosen = job.chosen_scheme if isinstance(job, CodedJob) else job.scheme
        known = (codes, scales, zeros, job.layout, plane, chosen)
        return cls(job.inputs[0], job.k_axis, job.scheme, job.name, *known)

    def with_layout(self, layout: BlockLayout) -> TunedJob:
        """Return the same work with its result in another layout."""
        source, codes, scales, zeros = self.inputs
        known = (codes, scales, zeros, layout, self.plane, self.chosen_scheme)
        return TunedJob(source, self.k_axis, self.scheme, self.name, *known)

    def preview(self, start: int, stop: int) -> NDArray[np.float32] | None:
        """Return columns of the source; None for one plane of it."""
        return super().preview(start, stop) if self.plane is None else None

    def _kept(self, coded: Coded) -> Coded:
        return coded if self.plane is None else plane_of(coded, self.chosen_scheme.bits, self.plane)

    def run(self, tile: Tile) -> TileOutput:
        """Store a range of columns, and compare it with the source."""
        part = slice(tile.start, tile.stop)
        codes, scales, zeros = (weight.view()[:, part] for weight in self.inputs[1:])
        coded, block = Coded(codes, scales, zeros), self.scheme.block_rows(self.rows)
        arrays = self._stored(self._packed(self._kept(coded), block))
        return TileOutput(
            [write for index, array in enumerate(arrays) for write in self._writes(index, array, tile)],
            self._errors(coded.dequantized(block), part),
        )

    def _errors(self, stored: NDArray[Any], part: slice) -> dict[str, float]:
        source = self.inputs[0].view()
        piece = np.asarray((source if self.k_axis == 0 else source.T)[:, part], np.float32)
        return {
            "nonfinite": 0.0,  # the codes' first choice has looked
            "sq_error": float(np.square(piece - stored, dtype=np.float64).sum()),
            "sq_weight": float(np.square(piece, dtype=np.float64).sum()),
        }


def codes_of(job: QuantizeJob) -> Codes:
    """Do the work of a job, and return the numbers that it would store.

    Raises:
        ModelError: The weight holds NaN or infinite values.
    """
    plain = job.with_layout("blocked_kn")
    raw = plain.compute()
    held = TileBuffers.allocate(spec_of(plain.scheme), Layout(plain.layout), plain.rows, plain.columns)
    for buffer, data in zip((held.codes, held.scales, held.zero_points), raw, strict=False):
        assert buffer is not None, plain.where()
        buffer.reshape(-1).view(np.uint8)[:] = data
    codes, scales, zeros = unpack(held)
    return Codes(np.ascontiguousarray(codes), np.array(scales, np.float32), np.ascontiguousarray(zeros))
