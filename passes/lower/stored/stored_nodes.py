"""Operators that hold few-bit weights of their own: what they compute, and why some of them cannot be taken in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import Accuracy
from onnxslim_llm.custom_ops import ops
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.weights import SparseWeight, Weight, weight_of
from onnxslim_llm.passes.lower.operators.element_types import element_type
from onnxslim_llm.passes.lower.stored.sparse_source import SparsePackedSource, packed_source
from onnxslim_llm.passes.lower.stored.stored_job import StoredJob
from onnxslim_llm.passes.lower.stored.stored_sources import NBitsSource, PackedSource, StoredSource
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["ORT_DOMAIN", "StoredNode", "check_own_operators", "read_stored"]

ORT_DOMAIN = "com.microsoft"

_ACCURACY: dict[int, Accuracy] = {0: "exact", 1: "exact", 2: "exact", 3: "exact", 4: "int8"}
"""Of MatMulNBits' accuracy levels; on CPUs all but 4 are computed in float32."""


class _CannotError(Exception):
    """Says in words why a node is left alone."""


@dataclass(frozen=True)
class StoredNode:
    """A product or look-up, taken apart.

    Attributes:
        node: It.
        operand: What is multiplied, or the indices of a look-up.
        sources: The weight, or the two halves of one that is packed for a gate.
        names: For the constants that take the weight's place: codes, scales, zero points.
        compute_type: Element type (TensorProto.DataType) of the result.
        accuracy: The least precision that is asked for.
        activation: As in custom_ops.ops.ACTIVATIONS.
        bias, residual, low_rank: What is added; None where there is nothing.
        absorbed: Nodes after it that belong to it.
    """

    node: gs.Node
    operand: gs.Tensor
    sources: tuple[StoredSource, ...]
    names: tuple[str, str, str]
    compute_type: int
    accuracy: Accuracy | None
    activation: str = "none"
    bias: gs.Tensor | None = None
    residual: gs.Tensor | None = None
    low_rank: tuple[gs.Tensor, gs.Tensor] | None = None
    absorbed: tuple[gs.Node, ...] = ()

    @property
    def result(self) -> gs.Variable:
        """What it makes."""
        return (self.node, *self.absorbed)[-1].outputs[0]

    @property
    def is_gather(self) -> bool:
        """Whether it looks up rows of a table."""
        return self.node.op in ("GatherPacked", "GatherBlockQuantized")

    @property
    def is_sparse(self) -> bool:
        """Whether its weight is a bitmap and codes."""
        return isinstance(self.sources[0], SparsePackedSource)

    @property
    def halves(self) -> int:
        """Two with a gate, otherwise one."""
        return len(self.sources)

    def job(self, half: int) -> StoredJob:
        """Return the work of copying the weight, or one half of it."""
        return StoredJob(self.sources[half], self.names[0], self.accuracy)


def read_stored(node: gs.Node) -> tuple[StoredNode | None, str]:
    """Return what a node computes, or None and the reason; no reason if it holds no weight."""
    readers = {
        (ORT_DOMAIN, "MatMulNBits"): _matmul_nbits,
        (ORT_DOMAIN, "GatherBlockQuantized"): _gather_block_quantized,
        (ops.DOMAIN, "MatMulPacked"): _matmul_packed,
        (ops.DOMAIN, "GatherPacked"): _gather_packed,
    }
    reader = readers.get((node.domain, node.op))
    if reader is None:
        return None, ""
    try:
        return reader(node), ""
    except (_CannotError, ValueError) as error:
        return None, str(error)


def check_own_operators(model: Model, context: Context) -> None:
    """Check that no operator of ours is left where the target has none.

    Raises:
        ModelError: One could not be taken apart; it says why.
    """
    if context.target is None or ops.DOMAIN in context.target.domains:
        return
    for node in (node for graph in model.all_graphs() for node in graph.nodes if node.domain == ops.DOMAIN):
        reason = read_stored(node)[1] or "it has no other form"
        what = f"{node.op} cannot be converted for target '{context.target.name}': {reason}"
        raise ModelError(what, where=f"node '{node.name}'", todo="compile for the target ort-cpu-ops")


def _matmul_nbits(node: gs.Node) -> StoredNode:
    inputs = _padded(node.inputs, 6)
    if inputs[4] is not None:
        raise _CannotError("its columns are permuted (g_idx)")
    if node.attrs.get("weight_prepacked", 0):
        raise _CannotError("its codes are rearranged for one runtime")
    codes, (scales, compute_type) = _weight(inputs[1], "codes"), _scales(inputs[2])
    zeros = None if inputs[3] is None else _weight(inputs[3], "zero points")
    if zeros is not None and zeros.onnx_dtype != TensorProto.UINT8:
        raise _CannotError(f"its zero points are of type {zeros.dtype}")
    source = NBitsSource(
        codes,
        scales,
        zeros,
        rows=_integer(node, "K"),
        columns=_integer(node, "N"),
        bits=_integer(node, "bits", 4),
        block=_integer(node, "block_size"),
    )
    accuracy = _ACCURACY.get(int(node.attrs.get("accuracy_level", 0)))
    names = _names([inputs[1], _behind_cast(inputs[2]), inputs[3]])
    return StoredNode(node, node.inputs[0], (source,), names, compute_type, accuracy, bias=inputs[5])


def _gather_block_quantized(node: gs.Node) -> StoredNode:
    inputs = _padded(node.inputs, 4)
    codes, (scales, compute_type) = _weight(inputs[0], "codes"), _scales(inputs[2])
    zeros = None if inputs[3] is None else _weight(inputs[3], "zero points")
    bits, block = _integer(node, "bits", 4), _integer(node, "block_size", 128)
    if codes.onnx_dtype != TensorProto.UINT8:
        raise _CannotError(f"its codes are of type {codes.dtype}, not bytes")
    if (
        len(codes.shape) != 2
        or node.attrs.get("gather_axis", 0) != 0
        or node.attrs.get("quantize_axis", 1) not in (1, -1)
    ):
        raise _CannotError("it looks up along another axis than the first one of a table")
    n, width = codes.shape
    rows = width * 8 // bits
    absorbed: tuple[gs.Node, ...] = ()
    cut = _cut_to(node, rows, block)
    if cut is not None:
        rows, absorbed = cut[0], (cut[1],)
    source = NBitsSource(codes, scales, zeros, rows=rows, columns=n, bits=bits, block=block)
    names = _names([inputs[0], _behind_cast(inputs[2]), inputs[3]])
    return StoredNode(node, node.inputs[1], (source,), names, compute_type, None, absorbed=absorbed)


def _cut_to(node: gs.Node, rows: int, block: int) -> tuple[int, gs.Node] | None:
    """Return the true K and the Slice to it, where the last block of a table is stored in full."""
    looked_up, indices = node.outputs[0], node.inputs[1]
    if len(looked_up.outputs) != 1 or indices.shape is None:
        return None
    after = looked_up.outputs[0]
    if after.op != "Slice" or normal_domain(after.domain) != "" or len(after.inputs) != 4:
        return None
    start, stop, axis = (constant_value(tensor, 1) for tensor in after.inputs[1:])
    if start is None or stop is None or axis is None or start.size != 1 or stop.size != 1 or axis.size != 1:
        return None
    last = int(axis.item()) in (-1, len(indices.shape))
    return (int(stop.item()), after) if last and start.item() == 0 and rows - block < stop.item() < rows else None


def _matmul_packed(node: gs.Node) -> StoredNode:
    inputs = _padded(node.inputs, 6)
    activation = str(node.attrs.get("activation", "none"))
    accuracy: Any = str(node.attrs.get("accuracy", "int8"))
    if activation not in ops.ACTIVATIONS or accuracy not in ops.ACCURACIES:
        raise _CannotError("an attribute has an unknown value")
    weight = _weight(inputs[1], "weight")
    halves = 2 if activation.endswith("_gate") else 1
    sources = tuple(packed_source(weight, half) for half in range(halves))
    if sources[0].packed_scheme.paired != (halves == 2):
        raise _CannotError("activation and weight do not agree on whether there is a gate")
    _check_sizes(node, sources[0])
    operand, compute_type = node.inputs[0], element_type(node.inputs[0])
    if compute_type is None:
        raise _CannotError("the type of its operand is unknown")
    u, v = inputs[4], inputs[5]
    return StoredNode(
        node,
        operand,
        sources,
        _names([inputs[1]]),
        compute_type,
        accuracy,
        activation,
        bias=inputs[2],
        residual=inputs[3],
        low_rank=None if u is None or v is None else (u, v),
    )


def _gather_packed(node: gs.Node) -> StoredNode:
    source = PackedSource(_weight(node.inputs[0], "weight"))
    if source.packed_scheme.paired:
        raise _CannotError("its table is packed for a gate")
    _check_sizes(node, source)
    return StoredNode(node, node.inputs[1], (source,), _names([node.inputs[0]]), TensorProto.FLOAT, None)


def _check_sizes(node: gs.Node, source: PackedSource) -> None:
    found = source.packed_scheme
    wanted = {"K": found.rows, "N": found.columns, "bits": found.bits, "block_size": found.block}
    for name, value in wanted.items():
        if _integer(node, name) != value:
            raise _CannotError(f"{name} = {node.attrs.get(name)}, but its weight says {value}")


def _padded(tensors: Sequence[gs.Tensor], count: int) -> list[gs.Tensor | None]:
    given = [None if tensor.is_empty() else tensor for tensor in tensors]
    return [*given, *[None] * (count - len(given))]


def _weight(tensor: gs.Tensor | None, what: str) -> Weight:
    if not isinstance(tensor, gs.Constant) or is_overridable(tensor):
        raise _CannotError(f"its {what} are no initializer that stays what it is")
    weight = weight_of(tensor)
    if isinstance(weight, SparseWeight):
        raise _CannotError(f"its {what} are stored sparse")
    return weight


def _behind_cast(tensor: gs.Tensor | None) -> gs.Tensor | None:
    if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 and tensor.inputs[0].op == "Cast":
        return tensor.inputs[0].inputs[0]
    return tensor


def _scales(tensor: gs.Tensor | None) -> tuple[Weight, int]:
    """Return scales as they are stored, and the type that they are computed in."""
    source = _behind_cast(tensor)
    weight = _weight(source, "scales")
    if source is tensor:
        return weight, weight.onnx_dtype
    assert isinstance(tensor, gs.Variable)
    wanted = int(tensor.inputs[0].attrs["to"])
    if weight.onnx_dtype != TensorProto.FLOAT16 or wanted != TensorProto.FLOAT:
        raise _CannotError("its scales are converted in a way that loses digits")
    return weight, wanted


def _integer(node: gs.Node, name: str, default: int | None = None) -> int:
    value = node.attrs.get(name, default)
    if not isinstance(value, int):
        raise _CannotError(f"its attribute {name} is missing")
    return value


def _names(tensors: Sequence[gs.Tensor | None]) -> tuple[str, str, str]:
    """Return names for codes, scales and zero points, after those that the constants have."""
    given = [None if tensor is None else tensor.name for tensor in tensors]
    first = given[0] or "weight"
    rest = [given[i] if i < len(given) else None for i in (1, 2)]
    return (first, rest[0] or f"{first}_scale", rest[1] or f"{first}_zp")
