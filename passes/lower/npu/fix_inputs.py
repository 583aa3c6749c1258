"""Fixed values for inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxslim_llm.errors import UsageError, did_you_mean
from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.ir.weights import constant
from onnxslim_llm.rewrite.edit import redirect
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FixInputs"]


@dataclass(frozen=True)
class FixInputs(Pass):
    """Give inputs of fixed size one value in all elements, or positions in order; they are no inputs any more.

    For runtimes that have no operators for masks: with "attention_mask=1" a model reads texts without padding.

    Before:
        agraph (int64[1, 128] input_ids, int64[1, 128] attention_mask) => (float[1, 128, 384] y)
    After:
        agraph (int64[1, 128] input_ids) => (float[1, 128, 384] y)

    Skips when:
        - the input's size is not fixed
        - it is an output, too.

    Attributes:
        values: Such as "attention_mask=1,position_ids=range": one number for all elements, or 0, 1, 2, ... along the
            last axis.
    """

    name: ClassVar[str] = "fix_inputs"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # the results for other values are gone

    values: str = ""

    def __post_init__(self) -> None:
        _parse(self.values)

    def apply(self, model: Model, context: Context) -> Change:
        """Put constants in the place of the inputs.

        Raises:
            UsageError: There is no such input.
        """
        change = Change()
        inputs = {tensor.name: tensor for tensor in model.graph.inputs}
        outputs = {id(tensor) for tensor in model.graph.outputs}
        for name, value in _parse(self.values).items():
            if name not in inputs:
                raise UsageError(f"there is no input '{name}'", where=self.name, todo=did_you_mean(name, inputs))
            tensor = inputs[name]
            shape = shape_of(tensor)
            if shape is None or tensor.dtype is None or not all(isinstance(dim, int) for dim in shape):
                change.skip(name, "its size is not fixed")
            elif id(tensor) in outputs:
                change.skip(name, "it is an output, too")
            else:
                sizes = [int(dim or 0) for dim in shape]
                content = np.full(sizes, value) if value is not None else np.broadcast_to(np.arange(sizes[-1]), sizes)
                redirect(tensor, constant(name, content.astype(tensor.dtype)))
                model.graph.inputs = [other for other in model.graph.inputs if other is not tensor]
                change.sites.append(name)
        return change


def _parse(text: str) -> dict[str, float | None]:
    """Return the values by name; None for positions in order.

    Raises:
        UsageError: The text is of another form.
    """
    found: dict[str, float | None] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = None if number.strip() == "range" else float(number)
        except ValueError as error:
            todo = "write it like attention_mask=1,position_ids=range"
            raise UsageError(f"'{part}' is no value of an input", where="fix_inputs", todo=todo) from error
    return found
