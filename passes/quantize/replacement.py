"""Put products and look-ups of few-bit weights where those of float weights were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import BLOCK_GATHER, BLOCK_MATMUL, WeightScheme
from onnxslim_llm.concepts.concept import replace_nodes
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights import Weight, constant
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.bits.mixed_precision import tied_ridge
from onnxslim_llm.passes.quantize.codes.calibrated_job import CalibratedJob, PlaneJob
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.passes.quantize.codes.planes import is_split
from onnxslim_llm.products.sites import Site, WeightGroup
from onnxslim_llm.rewrite.edit import Builder, detach, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change

if TYPE_CHECKING:
    from onnxslim_llm.stats.statistics import Statistics

__all__ = ["Chosen", "Replacement"]

_SCALE_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}

#: A weight, its scheme, and what is to be told about the choice.
Chosen = tuple[WeightGroup, WeightScheme, dict[str, Any]]


class Replacement:
    """Puts calls into the graphs, group by group, and all of them into place at the end."""

    def __init__(self, model: Model, change: Change, statistics: Statistics | None) -> None:
        self.model = model
        self.change = change
        self.statistics = statistics
        self.outputs = graph_output_ids(model)
        self.replaced: dict[int, list[gs.Node]] = {}
        self.removed: list[gs.Node] = []

    def replace(self, chosen: list[Chosen]) -> None:
        """Replace what reads these weights; `change` gets the account."""
        stored: dict[Hashable, int] = {}
        tensors = []
        for group, scheme, account in chosen:
            jobs = self._jobs(group, scheme)
            derived = [derive(job) for job in jobs]
            # One set of constants per graph: ONNX Runtime does not fuse what a subgraph reads from the graph around it.
            codes: dict[int, list[list[gs.Constant | None]]] = {}
            for site in group.sites:
                if id(site.graph) not in codes:
                    codes[id(site.graph)] = [
                        self._constants(group.name, job.scheme, weights)
                        for job, weights in zip(jobs, derived, strict=True)
                    ]
                self._replace_site(site, jobs, codes[id(site.graph)])
            self.change.sites.append(group.name)
            outputs = [weight for weights in derived for weight in weights]
            stored.update((w.storage_key, w.nbytes) for w in outputs)
            tensors.append(_entry(group, scheme, sum(w.nbytes for w in outputs)) | account)
        replace_nodes(self.model, self.replaced)
        counts = Counter(str(entry["bits"]) for entry in tensors)
        elements = sum(group.source.size for group, _, _ in chosen)
        self.change.detail.update(
            weights_by_bits=dict(sorted(counts.items())),
            bits_per_weight=round(8 * sum(stored.values()) / elements, 3),
            bytes=sum(stored.values()),
            tensors=tensors,
        )

    def _jobs(self, group: WeightGroup, scheme: WeightScheme) -> list[QuantizeJob]:
        """Return the work for a weight, one piece for each plane of its codes."""
        moments = self.statistics.of_weight(group.name) if self.statistics and scheme.method == "calibrated" else None
        ridge = tied_ridge(group, self.statistics)
        table = "embedding" in group.roles
        if moments is not None and (moments.size != group.rows or (table and not ridge)):
            moments = None
        if scheme.method == "calibrated" and moments is None:
            if not table:
                self.change.skip(group.name, "no calibration data reach it: quantized by search")
            scheme = replace(scheme, method="search")
        source, axis, name = group.source, group.k_axis, group.name
        if is_split(scheme):
            return [PlaneJob(source, axis, scheme, name, index, moments, ridge=ridge) for index in (0, 1)]
        if moments is not None:
            return [CalibratedJob(source, axis, scheme, name, moments, ridge=ridge)]
        return [QuantizeJob(source, axis, scheme, name)]

    def _constants(self, name: str, scheme: WeightScheme, derived: tuple[Weight, ...]) -> list[gs.Constant | None]:
        names = (f"{name}_q{scheme.bits}", f"{name}_scale", f"{name}_zp")
        made: list[gs.Constant | None] = [
            constant(self.model.fresh_name(hint), weight) for hint, weight in zip(names, derived, strict=False)
        ]
        return made if len(made) == len(names) else [*made, None]

    def _replace_site(
        self, site: Site, jobs: Sequence[QuantizeJob], codes: Sequence[Sequence[gs.Constant | None]]
    ) -> None:
        node = site.node
        inputs, outputs = list(node.inputs), list(node.outputs)
        gemm = dict(node.attrs) if node.op == "Gemm" else {}
        detach(node)
        self.removed.append(node)
        concept, read = (BLOCK_GATHER, inputs[1]) if node.op == "Gather" else (BLOCK_MATMUL, inputs[0])
        op = Builder(self.model, node.name)
        parts: list[gs.Node] = []
        for job, constants in zip(jobs, codes, strict=True):
            attributes = {"block_size": job.stored_block, "scale_type": int(_SCALE_TYPES[site.computes_in])}
            last = outputs[0] if len(jobs) == 1 else self._inner(node.name, outputs[0])
            name = node.name if not parts else self.model.fresh_name(f"{node.name}/low_bits")
            parts.append(concept.call(self.model, name, [read, *constants], [last], attributes))
        made = [*parts]
        if len(parts) > 1:
            op.Add(parts[0].outputs[0], parts[1].outputs[0])
            op.nodes[-1].outputs[0] = outputs[0]
            made += op.nodes
        if node.op != "Gather":
            made += self._gemm_rest(made[-1], inputs[2:], gemm, site)
        self.replaced[id(node)] = made
        weight = inputs[0 if node.op == "Gather" else 1]
        if isinstance(weight, gs.Variable):
            for dead in remove_dead(weight.inputs, self.outputs):
                self.replaced[id(dead)] = []
                self.removed.append(dead)

    def _inner(self, name: str, like: gs.Tensor) -> gs.Variable:
        return gs.Variable(self.model.fresh_name(f"{name}/plane"), like.dtype, like.shape)

    def _gemm_rest(self, call: gs.Node, bias: list[gs.Tensor], attributes: dict[str, Any], site: Site) -> list[gs.Node]:
        """Return what Gemm does after its product: alpha * product + beta * bias."""
        alpha, beta = float(attributes.get("alpha", 1.0)), float(attributes.get("beta", 1.0))
        bias = [tensor for tensor in bias if not tensor.is_empty() and beta != 0.0]
        if alpha == 1.0 and not bias:
            return []
        result = call.outputs[0]
        op = Builder(self.model, call.name)
        value: gs.Tensor = gs.Variable(self.model.fresh_name(f"{call.name}/product"), result.dtype, result.shape)
        call.outputs[0] = value
        if alpha != 1.0:
            value = op.Mul(value, _scalar(alpha, site.computes_in))
        if bias:
            shift = bias[0] if beta == 1.0 else op.Mul(bias[0], _scalar(beta, site.computes_in))
            value = op.Add(value, shift)
        op.nodes[-1].outputs[0] = result
        return op.nodes


def _scalar(value: float, dtype: str) -> np.ndarray[Any, Any]:
    return np.array(value, dtype)


def _entry(group: WeightGroup, scheme: WeightScheme, nbytes: int) -> dict[str, Any]:
    return {
        "name": group.name,
        "roles": sorted(group.roles | group.sensitive),
        "shape": list(group.source.shape),
        "bits": scheme.bits,
        "block": scheme.block,
        "symmetric": scheme.symmetric,
        "bytes": [group.source.nbytes, nbytes],
    }
