"""Values that sums refuse, such as NaN: the error names the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnxslim_llm.errors import ModelError

__all__ = ["values_of"]

_TODO = (
    "run the model on these data by itself, with `onnxslim-llm eval` if they are a text; a float16 model may overflow"
)


@contextmanager
def values_of(tensor: str, source: str = "the calibration data", todo: str = _TODO) -> Iterator[None]:
    """Take in values of a tensor.

    Args:
        tensor: its name.
        source: what made the values.
        todo: what to do about those that are refused.

    Raises:
        ModelError: a FloatingPointError came up: its text says what the values are.
    """
    try:
        yield
    except FloatingPointError as error:
        raise ModelError(f"{source} make {error}", where=f"tensor '{tensor}'", todo=todo) from error
