"""Give quantized products back, by two thin matrices, the part of their error that matters most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.block_weights import BLOCK_MATMUL, BlockJob, job_of
from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.weights import constant
from onnxslim_llm.passes.lowrank.error_factors import ErrorFactors, error_factors
from onnxslim_llm.products.knapsack import Choice, choose
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context
    from onnxslim_llm.stats.statistics import Statistics

__all__ = ["CompensateLowRank"]

_FLOAT16 = 10  # TensorProto.FLOAT16
#: About what the nodes, tensors and alignment of one layer's products take in the files, beside codes and scales.
_GRAPH_BYTES = 2000
#: Ranks that a layer may get: the first directions matter most.
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_TINY = 1e-30


@dataclass(frozen=True)
class _Site:
    """A quantized product, and what products with factors of its error would bring."""

    graph: gs.Graph
    call: gs.Node
    job: BlockJob
    factors: ErrorFactors
    harm: float  # of a squared error of 1, compared with the other sites

    @property
    def scale_type(self) -> Any:
        return np.float16 if self.call.attrs["scale_type"] == _FLOAT16 else np.float32

    def nbytes(self, rank: int) -> int:
        return self.factors.nbytes(rank, np.dtype(self.scale_type).itemsize) + _GRAPH_BYTES if rank else 0


@dataclass(frozen=True)
class CompensateLowRank(Pass):
    """Add the largest directions of the error of quantized weights back as a product of two thin matrices of few bits.

    E = W - W_q is approximated by A B so that the error in the output, weighed by the inputs of calibration data, is
    least (QERA, EoRA: the truncated decomposition of E whitened by H = X^T X). With a budget the ranks are shared out
    over the layers by what they save per byte. Rounding without data leaves errors that a few directions dominate;
    compensated codes (method=calibrated) leave hardly any, and then more bits are worth more.

    Before:
        y = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (x, W_q4, W_scale, W_zp)
    After:
        p = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (x, W_q4, W_scale, W_zp)
        A = DequantizeLinear <axis = 1> (A_q4, A_scale)
        t = MatMul (x, A)
        B = DequantizeLinear <axis = 0> (B_q4, B_scale)
        c = MatMul (t, B)
        y = Add (p, c)

    Skips when:
        - the error falls by less than `min_gain` on samples that were held out, or without data in the weight;
        - the budget is better spent on other weights;
        - the rank is more than half of the smaller side: that would be no thin matrix;
        - the codes are in two planes, or come from a model that was quantized before: the source weight is not known;
        - the calibration data are zero where it reads them.

    Attributes:
        rank: Columns of the first and rows of the second matrix; with a budget the most that a layer may get.
        min_gain: Share of the squared error that must go; does not count with a budget.
        budget: Bytes that all matrices together may take, as a share of the model's; 0: `rank` for every layer.
        bits: Of the matrices: 4 or 8, with a scale for each direction.
    """

    name: ClassVar[str] = "compensate_low_rank"
    group: ClassVar[str] = "lowrank"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.COMPENSATE

    rank: int = 16
    min_gain: float = 0.1
    budget: float = 0.0
    bits: Literal[4, 8] = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank must be 1 or more, not {self.rank}", where=self.name)
        if not 0 <= self.min_gain < 1:
            raise UsageError(f"min_gain must lie between 0 and 1, not {self.min_gain}", where=self.name)
        if not 0 <= self.budget < 1:
            todo = "give a share of the model's bytes, such as 0.04"
            raise UsageError(f"budget = {self.budget:g} is not possible", where=self.name, todo=todo)
        if self.bits not in (4, 8):
            raise UsageError(f"bits must be 4 or 8, not {self.bits}", where=self.name)

    @property
    def wants_statistics(self) -> bool:
        """Calibration data are used where there are any."""
        return True

    @property
    def takes_own_text(self) -> bool:
        """Text that the model writes will do, and nothing where it does not run."""
        return True

    @property
    def wants_gains(self) -> bool:
        """Whether ranks are shared out by what errors do to the answer."""
        return self.budget > 0

    def apply(self, model: Model, context: Context) -> Change:
        """Quantize each weight, and add the products where they help."""
        change = Change(detail={"layers": []})
        sites = []
        for graph, call in list(calls(model, BLOCK_MATMUL)):
            site = self._site(graph, call, context.statistics)
            if isinstance(site, _Site):
                sites.append(site)
            else:
                job = job_of(call)
                change.skip(job.where() if job is not None else call.name, site)
        limit = int(self.budget * model.weight_bytes())
        for site, rank in zip(sites, self._ranks(sites, limit), strict=True):
            errors = site.factors.errors
            if not rank:
                ratio = errors[max(errors)] / errors[0] if errors[0] else 1.0
                reason = "the budget is better spent on others; " if self.budget else ""
                change.skip(site.job.where(), f"{reason}the error becomes {ratio:.3f} times what it is")
                continue
            _add_products(model, site, rank)
            change.sites.append(site.job.where())
            entry = {"rank": rank, "error_ratio": round(errors[rank] / errors[0], 4), "bytes": site.nbytes(rank)}
            change.detail["layers"].append({"name": site.job.where(), **entry})
        return change

    def _site(self, graph: gs.Graph, call: gs.Node, statistics: Statistics | None) -> _Site | str:
        job = job_of(call)
        if job is None:
            return "its codes were there before: the source weight is not known"
        most = min(job.rows, job.columns) // 2
        ranks = sorted({rank for rank in _STEPS if rank < min(self.rank, most)} | {min(self.rank, most)})
        if not self.budget:
            ranks = [self.rank]
        if ranks[-1] > most or ranks[-1] < 1:
            return f"rank {self.rank} is more than half of {min(job.rows, job.columns)}"
        moments = statistics.of_weight(job.where()) if statistics is not None else None
        known = moments.load() if moments is not None and moments.size == job.rows else None
        factors = error_factors(job, ranks, self.bits, known)
        if isinstance(factors, str):
            return factors
        gain = statistics.gains.get(statistics.origin_of(job.where())) if statistics is not None else None
        harm = gain.per_square if gain is not None and known is not None and not gain.of_table else 0.0
        return _Site(graph, call, job, factors, harm)

    def _ranks(self, sites: Sequence[_Site], limit: int) -> list[int]:
        """Return the rank of each site; 0 where products are not worth their bytes."""
        if not self.budget:
            found = [site.factors.errors for site in sites]
            return [self.rank if e[self.rank] < e[0] * (1 - self.min_gain) else 0 for e in found]
        by_gain = all(site.harm > 0 for site in sites)
        items = []
        for site in sites:
            unit = site.harm if by_gain else 1 / max(site.factors.signal, _TINY)
            items.append([Choice(site.nbytes(rank), unit * error) for rank, error in site.factors.errors.items()])
        picked = choose(items, limit)
        assert picked is not None  # no products at all always fit
        return [list(site.factors.errors)[index] for site, index in zip(sites, picked, strict=True)]


def _add_products(model: Model, site: _Site, rank: int) -> None:
    graph, call = site.graph, site.call
    result = call.outputs[0]
    where = site.job.where()
    op = Builder(model, f"{where}_rest")  # short: names are a good part of what the products take
    product = gs.Variable(model.fresh_name(f"{result.name}/quantized"), result.dtype, result.shape)
    call.outputs[0] = product
    value: Any = call.inputs[0]
    for factor, hint in ((site.factors.left, "A"), (site.factors.right, "B")):
        part = factor.part(rank)
        parts = ((f"q{part.bits}", part.stored), ("scale", part.scale.astype(site.scale_type)))
        stored = [constant(model.fresh_name(f"{where}_{hint}_{what}"), array) for what, array in parts]
        value = op.MatMul(value, op.DequantizeLinear(*stored, axis=part.axis))
    op.Add(product, value)
    op.nodes[-1].outputs[0] = result
    place = next(i for i, node in enumerate(graph.nodes) if node is call)
    graph.nodes[place + 1 : place + 1] = op.nodes
