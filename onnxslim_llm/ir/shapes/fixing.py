"""Sizes that a user gives to the symbolic dimensions of a model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from onnxslim_llm.errors import UsageError, did_you_mean
from onnxslim_llm.ir.shapes.dims import Dim, Expr, parse, product

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

__all__ = ["OPTION", "free_dimensions", "parse_sizes", "resolve_sizes", "substitute"]

OPTION = "--shape"
_EXAMPLE = "write it like batch_size=1,sequence_length=128; input_ids.1=128 names a dimension without a name"


def parse_sizes(text: str) -> dict[str, int]:
    """Return the sizes of "batch=1,seq=128", by name.

    Raises:
        UsageError: The text is of another form, a size is negative, or a name has two sizes.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, number = (word.strip() for word in part.partition("="))
        if not equals or not name or not number.isdecimal():
            raise UsageError(f"'{part}' is no size", where=OPTION, todo=_EXAMPLE)
        if sizes.setdefault(name, int(number)) != int(number):
            raise UsageError(f"'{name}' has the sizes {sizes[name]} and {number}", where=OPTION, todo="give one")
    return sizes


def resolve_sizes(inputs: Iterable[gs.Tensor], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes by the symbols of the inputs' shapes, and by "INPUT.AXIS" for dimensions without a name.

    A name may be the beginning of a symbol ("seq" for "sequence_length") if only one begins like it.

    Raises:
        UsageError: A name fits no dimension, or several.
    """
    inputs = list(inputs)
    symbols = sorted({name for tensor in inputs for dim in tensor.shape or () for name in _symbols(dim)})
    places = [f"{t.name}.{axis}" for t in inputs for axis, dim in enumerate(t.shape or ()) if _symbols(dim) or not dim]
    found: dict[str, int] = {}
    for name, size in sizes.items():
        exact = name in symbols or name in places
        near = [name] if exact else [symbol for symbol in symbols if symbol.startswith(name)]
        if len(near) != 1:
            what = (
                f"no dimension of an input is called '{name}'" if not near else f"'{name}' may be {' or '.join(near)}"
            )
            todo = did_you_mean(name, [*symbols, *places]) if symbols or places else "all sizes are fixed already"
            raise UsageError(what, where=OPTION, todo=todo)
        if found.setdefault(near[0], size) != size:
            raise UsageError(f"'{near[0]}' has the sizes {found[near[0]]} and {size}", where=OPTION, todo="give one")
    return found


def substitute(dim: int | str | None, sizes: Mapping[str, int]) -> int | str | None:
    """Return the dimension with the given sizes put in: a number if no symbol is left."""
    if not isinstance(dim, str) or not dim:
        return dim
    value = parse(dim)
    total: Dim = 0
    for monomial, factor in value.terms if isinstance(value, Expr) else (((), value),):
        total = total + product([factor, *(sizes.get(name, parse(name)) for name in monomial)])
    return total if isinstance(total, int) else str(total)


def free_dimensions(inputs: Iterable[gs.Tensor]) -> list[tuple[str, str]]:
    """Return (where, name) of the dimensions that are no numbers, each name once; "INPUT.AXIS" for one without."""
    found: dict[str, str] = {}
    for tensor in inputs:
        for axis, dim in enumerate(tensor.shape if tensor.shape is not None else ()):
            if not isinstance(dim, int):
                for name in _symbols(dim) or [f"{tensor.name}.{axis}"]:
                    found.setdefault(name, f"input '{tensor.name}', axis {axis}")
    return [(where, name) for name, where in found.items()]


def _symbols(dim: int | str | None) -> list[str]:
    if not isinstance(dim, str) or not dim:
        return []
    value = parse(dim)
    return sorted({name for monomial, _ in value.terms for name in monomial}) if isinstance(value, Expr) else []
