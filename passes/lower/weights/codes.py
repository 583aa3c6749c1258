"""From a concept call back to the recorded work behind it, and to constants in the layout that a target wants."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.block_weights import BLOCK_GATHER, BLOCK_MATMUL, BlockJob, BlockLayout, job_of
from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.ir.weights import Weight, constant
from onnxslim_llm.ir.weights.jobs import DerivedWeight, derive
from onnxslim_llm.rewrite.edit import Builder, detach

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["BlockCall", "Constants", "take_calls"]


@dataclass
class BlockCall:
    """A call of BlockMatMul or BlockGather, taken out of its graph.

    Attributes:
        node: The detached node.
        graph: Where it was.
        operand: What it multiplies (BlockMatMul) or looks up (BlockGather).
        result: What it makes.
        constants: Its codes, scales and zero points, by their old names.
        job: The recorded work.
        scale_type: Element type (TensorProto.DataType) that is computed in.
        tied: Products and look-ups share this weight.
    """

    node: gs.Node
    graph: gs.Graph
    operand: gs.Tensor
    result: gs.Variable
    constants: list[gs.Constant]
    job: BlockJob
    scale_type: int
    tied: bool

    @property
    def is_gather(self) -> bool:
        """Whether it looks up rows of a table."""
        return BLOCK_GATHER.is_call(self.node)

    def weights(self, layout: BlockLayout) -> tuple[DerivedWeight, ...]:
        """Return codes, scales and, unless symmetric, zero points in a layout."""
        return derive(self.job.with_layout(layout))

    def stored_block(self, layout: BlockLayout) -> int:
        """Return how many rows share a stored scale in a layout."""
        return self.job.with_layout(layout).stored_block


class Constants:
    """Makes the constants that take the place of the calls' codes, scales and zero points.

    The first one for an old constant takes over its name.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._named: set[str] = set()
        self._shared: dict[Hashable, gs.Constant] = {}
        self._cast: dict[Hashable, gs.Variable] = {}

    def own(self, call: BlockCall, index: int, weight: Weight) -> gs.Constant:
        """Return a new constant for output `index` of a call's work, for one reader."""
        name = call.constants[index].name
        while name in self._named:  # twice if the model forgot the name with the calls
            name = self._model.fresh_name(name)
        self._named.add(name)
        return constant(name, weight)

    def shared(self, call: BlockCall, index: int, weight: Weight) -> gs.Constant:
        """Return a constant for output `index` of a call's work, the same one for the same content."""
        if weight.key not in self._shared:
            self._shared[weight.key] = self.own(call, index, weight)
        return self._shared[weight.key]

    def shared_scales(self, op: Builder, call: BlockCall, weight: Weight) -> gs.Tensor:
        """Return shared scales in the type that is computed in; the Cast is shared within a graph, too."""
        scales = self.shared(call, 1, weight)
        if weight.onnx_dtype == call.scale_type:
            return scales
        key = (id(call.graph), id(scales), call.scale_type)
        if key not in self._cast:
            self._cast[key] = op.Cast(scales, to=call.scale_type)
        return self._cast[key]


def take_calls(model: Model, *, leave_tables: Sequence[int] = ()) -> tuple[list[BlockCall], list[gs.Node]]:
    """Return the calls with recorded work, detached, and those without (of a model that was saved half way).

    Args:
        model: The model.
        leave_tables: Look-ups in tables with codes of these widths that no product shares stay where they are.
    """
    found: list[BlockCall] = []
    opaque: list[gs.Node] = []
    for graph, node in calls(model, BLOCK_MATMUL, BLOCK_GATHER):
        job = job_of(node)
        if job is None:
            opaque.append(node)
            continue
        tensors = list(node.inputs)
        constants = [tensor for tensor in tensors[1:] if isinstance(tensor, gs.Constant)]
        scale_type = int(node.attrs["scale_type"])
        found.append(BlockCall(node, graph, tensors[0], node.outputs[0], constants, job, scale_type, tied=False))
    uses: dict[object, set[str]] = {}
    for call in found:
        uses.setdefault(call.job.identity, set()).add(call.node.op)
    for call in found:
        call.tied = len(uses[call.job.identity]) > 1
    taken = [c for c in found if not c.is_gather or c.tied or c.job.scheme.bits not in leave_tables]
    for call in taken:
        detach(call.node)
    return taken, opaque
