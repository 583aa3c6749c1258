"""Products and look-ups whose codes are recorded work that another choice of codes can take the place of."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.block_weights import BLOCK_GATHER, BLOCK_MATMUL, job_of
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.walk import with_subgraphs
from onnxslim_llm.passes.quantize.codes.calibrated_job import CalibratedJob, PlaneJob
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.passes.quantize.codes.tuned_job import TunedJob
from onnxslim_llm.rewrite.passes import Change

__all__ = ["CodedSite", "coded_sites", "is_plane"]


@dataclass
class CodedSite:
    """A coded weight, or a plane of one, and what holds it in the graph.

    Attributes:
        job: Its work.
        constants: Codes, scales and perhaps zero points.
        looked_up: Whether look-ups read it.
    """

    job: QuantizeJob
    constants: tuple[gs.Constant, ...]
    looked_up: bool = False


def coded_sites(model: Model, change: Change) -> list[CodedSite]:
    """Return the coded weights that may change, in the order of their products; `change` gets what is left alone."""
    found: dict[int, CodedSite] = {}
    calls, *inner = ([node for node in graph.nodes if _is_call(node)] for graph in with_subgraphs(model.graph))
    elsewhere = {job.identity for nodes in inner for node in nodes if (job := job_of(node)) is not None}
    for node in calls:
        job = job_of(node)
        where = node.name or node.outputs[0].name
        if type(job) not in (QuantizeJob, CalibratedJob, PlaneJob, TunedJob):
            change.skip(where, "its codes are no recorded work of one weight")
            continue
        assert isinstance(job, QuantizeJob)
        if job.identity in elsewhere:
            change.skip(where, "products in a branch read its weight")
            continue
        constants = tuple(t for t in node.inputs[1:] if isinstance(t, gs.Constant))
        site = found.setdefault(id(node.inputs[1]), CodedSite(job, constants))
        site.looked_up |= BLOCK_GATHER.is_call(node)
    return list(found.values())


def is_plane(job: QuantizeJob) -> bool:
    """Return whether a job stores one plane of codes."""
    return isinstance(job, PlaneJob) or (isinstance(job, TunedJob) and job.plane is not None)


def _is_call(node: gs.Node) -> bool:
    return BLOCK_MATMUL.is_call(node) or BLOCK_GATHER.is_call(node)
