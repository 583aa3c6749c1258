"""Computing one tensor of a model for chosen sizes and inputs, to find out what it means.

Masks, position ids and tables of angles are small programs over sizes, ranges and a few graph inputs. A `Probe` takes
the nodes that make such a tensor, and computes them for any sizes that one cares to try. Sizes of tensors that the
model computes elsewhere (the hidden states, say) are known as expressions of the input sizes, so that Shape needs no
data: only inputs whose *content* matters are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim, Expr
from onnxslim_llm.ir.shapes.symbolic import UNKNOWN
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.rewrite.constants import constant_tensor, constant_value
from onnxslim_llm.rewrite.evaluate import FOLDABLE, NodeEvaluator
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["Probe", "Unprobed", "make_probe", "size_at", "symbols_of"]

#: Masks that exporters write have 10 to 60 nodes.
MAX_NODES = 256
#: Elements of a constant that is read; the largest tables of masks in use have 2048 x 2048.
MAX_CONSTANT = 1 << 22
#: Elements of a value on the way; 4 bytes each.
MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Unprobed:
    """Why a tensor cannot be computed apart from the model.

    Attributes:
        reason: One sentence.
        culprit: Name of the node or tensor that is the reason.
    """

    reason: str
    culprit: str


def size_at(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    """Return what a dimension is for given sizes; None if one that it depends on is missing."""
    if isinstance(dim, int):
        return dim
    total = 0
    for names, factor in dim.terms:
        for name in names:
            if name not in sizes:
                return None
            factor *= sizes[name]
        total += factor
    return total


def symbols_of(dim: Dim) -> set[str]:
    """Return the names that a dimension depends on."""
    return {name for names, _ in dim.terms for name in names} if isinstance(dim, Expr) else set()


@dataclass
class Probe:
    """The nodes that make a tensor.

    Attributes:
        tensor: What is computed.
        nodes: In order. Shape nodes whose answer is known from the sizes have nothing in front of them.
        inputs: Graph inputs whose content is read.
        symbols: Sizes that it depends on by way of Shape; those of `inputs` are not among them.
        constants: Every constant that is read.
    """

    tensor: gs.Tensor
    opset: int
    nodes: list[gs.Node] = field(default_factory=list)
    inputs: list[gs.Variable] = field(default_factory=list)
    symbols: set[str] = field(default_factory=set)
    constants: list[gs.Tensor] = field(default_factory=list)
    _shapes: dict[int, tuple[Dim, ...]] = field(default_factory=dict)
    _runners: dict[int, NodeEvaluator] = field(default_factory=dict)
    _known: dict[int, NDArray[Any]] = field(default_factory=dict)

    def known(self, constant: gs.Tensor) -> NDArray[Any]:
        """Return the value of one of `constants`."""
        return self._known[id(constant)]

    def reads_content(self, node: gs.Node) -> bool:
        """Return whether a node is computed from the content of its inputs: false for Shape of a known shape."""
        return id(node) not in self._shapes

    def __call__(
        self,
        sizes: Mapping[str, int],
        feeds: Mapping[str, NDArray[Any]],
        replaced: Mapping[int, NDArray[Any]] | None = None,
    ) -> NDArray[Any] | None:
        """Return the tensor's value, or None where it cannot be computed (sizes that do not fit, too many elements).

        Args:
            sizes: A number for each of `symbols`.
            feeds: A value for each of `inputs`, by name.
            replaced: Values to take instead of those of constants, by `id` of the tensor.
        """
        values: dict[int, NDArray[Any]] = {**self._known, **(replaced or {})}
        for tensor in self.inputs:
            values[id(tensor)] = np.asarray(feeds[tensor.name])
        for node in self.nodes:
            shape = self._shapes.get(id(node))
            if shape is not None:
                dims = [size_at(dim, sizes) for dim in _kept(shape, node)]
                numbers = [dim for dim in dims if dim is not None]
                if len(numbers) != len(dims):
                    return None
                values[id(node.outputs[0])] = np.array(numbers, np.int64)
                continue
            results = self._runners[id(node)]([None if t.is_empty() else values[id(t)] for t in node.inputs])
            if results is None or sum(result.size for result in results) > MAX_ELEMENTS:
                return None
            for tensor, result in zip(node.outputs, results, strict=True):
                values[id(tensor)] = result
        return values[id(self.tensor)]


def make_probe(
    model: Model,
    values: SymbolicValues,
    tensor: gs.Tensor,
    allowed: Collection[str] = FOLDABLE,
    check: Callable[[gs.Node], str] = lambda node: "",
) -> Probe | Unprobed:
    """Return the backward slice of `tensor`, ready to be computed, or why it cannot be.

    Args:
        model: The model.
        values: Its symbolic shapes, as it is now.
        tensor: A tensor of the top graph.
        allowed: Operators of ai.onnx that the slice may hold, apart from Shape and Constant. None of them draws random
            numbers or has subgraphs.
        check: Returns why a node with an allowed operator is not welcome, or "".
    """
    probe = Probe(tensor, model.opset() or 1)
    inputs = {id(t) for t in model.graph.inputs}
    done: set[int] = set()
    stack: list[tuple[gs.Tensor, bool]] = [(tensor, False)]
    while stack:
        current, after = stack.pop()
        if after:
            probe.nodes.append(current.inputs[0])
            continue
        if id(current) in done or current.is_empty():
            continue
        done.add(id(current))
        if id(current) in inputs and isinstance(current, gs.Variable):
            if current.type != "tensor_type" or current.dtype is None:
                return Unprobed("it depends on an input that is no tensor", current.name)
            probe.inputs.append(current)
            continue
        unknown = _add_constant(probe, current)
        if unknown is None:
            continue
        if unknown:
            return Unprobed(unknown, current.name)
        node = current.inputs[0]
        if any(id(other) in done for other in node.outputs if other is not current):
            continue
        if len(probe._runners) + len(probe._shapes) >= MAX_NODES:
            return Unprobed(f"it takes more than {MAX_NODES} nodes", node.outputs[0].name)
        if normal_domain(node.domain) != "" or (node.op not in allowed and node.op != "Shape"):
            return Unprobed(f"it depends on {node.op}", node.outputs[0].name)
        stack.append((current, True))
        if node.op == "Shape":
            shape = values.shape_of(node.inputs[0])
            if shape is not None and not any(UNKNOWN in name for dim in shape for name in symbols_of(dim)):
                probe._shapes[id(node)] = shape
                probe.symbols |= {name for dim in _kept(shape, node) for name in symbols_of(dim)}
                continue
        else:
            reason = check(node)
            if reason:
                return Unprobed(reason, node.outputs[0].name)
        probe._runners[id(node)] = NodeEvaluator(node, probe.opset)
        stack += [(operand, False) for operand in reversed(node.inputs)]
    return probe


def _kept(shape: tuple[Dim, ...], node: gs.Node) -> tuple[Dim, ...]:
    end = node.attrs.get("end")
    return shape[slice(int(node.attrs.get("start", 0)), None if end is None else int(end))]


def _add_constant(probe: Probe, tensor: gs.Tensor) -> str | None:
    """Note the value of a constant; return None if it is one, "" if a node computes the tensor, else what it is."""
    source = constant_tensor(tensor)
    if source is not None:
        weight = weight_of(source)
        if weight.size > MAX_CONSTANT or not isinstance(weight.dtype, np.dtype) or weight.dtype.kind not in "iufb":
            return "it reads a large or unusual constant"
        probe._known[id(tensor)] = weight.load()
    else:
        value = constant_value(tensor)
        if value is None:
            return (
                "" if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 else "it is no tensor of this graph"
            )
        probe._known[id(tensor)] = value
    probe.constants.append(tensor)
    return None
