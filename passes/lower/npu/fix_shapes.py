"""Fixed sizes for symbolic dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.shapes import infer_shapes, shape_of
from onnxslim_llm.ir.shapes.fixing import free_dimensions, parse_sizes, resolve_sizes, substitute
from onnxslim_llm.ir.weights import constant
from onnxslim_llm.passes.lower.empty_operands import drop_empty_operands
from onnxslim_llm.rewrite.edit import redirect
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FixShapes"]


@dataclass(frozen=True)
class FixShapes(Pass):
    """Give symbolic dimensions of the inputs a size; what follows from that, cleanup folds.

    An input that has no elements then (the cache of a graph that reads prompts) has only one possible value: it becomes
    a constant, and is no input any more. A join with it is one without it.

    Before:
        agraph (int64[B, S] input_ids, float[B, 4, P, 32] past) => (float[B, 4, T, 32] present)
    After:
        agraph (int64[1, 128] input_ids) => (float[1, 4, 128, 32] present)

    Skips when:
        - a dimension is not named in `sizes`: it stays symbolic
        - an input without elements is an output, too.

    Attributes:
        sizes: Such as "batch_size=1,sequence_length=128"; the beginning of a name will do if only one begins like it.
            "input_ids.1=128" names a dimension by its input and axis.
    """

    name: ClassVar[str] = "fix_shapes"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # asked for: without it the target refuses the model

    sizes: str = ""

    def __post_init__(self) -> None:
        parse_sizes(self.sizes)

    def apply(self, model: Model, context: Context) -> Change:
        """Put the sizes into the graph's interface, and infer everything else again.

        Raises:
            UsageError: A name fits no dimension, or several; or an output has no elements with these sizes.
        """
        change = Change()
        if not free_dimensions(model.graph.inputs):  # the sizes are fixed already
            return change
        sizes = resolve_sizes(model.graph.inputs, parse_sizes(self.sizes))
        if not sizes:
            return change
        for tensor in model.graph.inputs:
            if tensor.shape is not None and (fixed := _fixed(tensor, sizes)) != list(tensor.shape):
                tensor.shape = fixed
                change.sites.append(tensor.name)
            for name in {str(d) for d in tensor.shape or () if not isinstance(d, int)}:
                change.skip(tensor.name, f"no size is given for '{name}'")
        if not change:
            return change
        for tensor in model.graph.outputs:
            if tensor.shape is not None:
                tensor.shape = [substitute(dim, sizes) for dim in tensor.shape]
        gone = _drop_empty_inputs(model, change)
        _forget_inner_shapes(model)
        if gone:
            drop_empty_operands(model)
            change.detail["inputs without elements"] = gone
        infer_shapes(model)
        for tensor in model.graph.outputs:
            _settle(tensor)
        return change


def _fixed(tensor: gs.Tensor, sizes: dict[str, int]) -> list[int | str | None]:
    return [sizes.get(f"{tensor.name}.{axis}", substitute(dim, sizes)) for axis, dim in enumerate(tensor.shape)]


def _drop_empty_inputs(model: Model, change: Change) -> list[str]:
    outputs = {id(tensor) for tensor in model.graph.outputs}
    gone: list[str] = []
    for tensor in list(model.graph.inputs):
        if tensor.shape is None or 0 not in tensor.shape or any(not isinstance(d, int) for d in tensor.shape):
            continue
        if id(tensor) in outputs:
            change.skip(tensor.name, "it is an output, too")
            continue
        empty = constant(tensor.name, np.zeros(tensor.shape, tensor.dtype))
        redirect(tensor, empty)
        model.graph.inputs = [other for other in model.graph.inputs if other is not tensor]
        gone.append(tensor.name)
    return gone


def _forget_inner_shapes(model: Model) -> None:
    known = {id(tensor) for tensor in (*model.graph.inputs, *model.graph.outputs)}
    for graph in model.graphs():
        for node in graph.nodes:
            for tensor in node.outputs:
                tensor.__dict__.pop("derived_shape", None)
                if id(tensor) not in known and isinstance(tensor, gs.Variable):
                    tensor.shape = None


def _settle(tensor: gs.Tensor) -> None:
    """Declare for an output what was derived.

    Raises:
        UsageError: It has no elements.
    """
    derived = shape_of(tensor)
    if derived is not None and tensor.shape is not None and len(derived) == len(tensor.shape):
        pairs = zip(tensor.shape, derived, strict=True)
        tensor.shape = [known if isinstance(known, int) else (size or known) for known, size in pairs]
    if derived is not None and 0 in derived:
        raise UsageError(
            f"the output '{tensor.name}' has no elements with these sizes: {list(derived)}",
            where="--shape",
            todo="give every dimension of the tokens a size of 1 or more",
        )
