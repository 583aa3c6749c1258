"""Which scheme a weight gets: the pass's options, then its role, then the scopes whose pattern fits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from onnxslim_llm.concepts.block_weights import Accuracy, Method, WeightScheme
from onnxslim_llm.errors import UsageError, did_you_mean
from onnxslim_llm.passes.quantize.codes.planes import PLANES
from onnxslim_llm.products.selection import compile_patterns
from onnxslim_llm.products.sites import ComputeType

__all__ = [
    "BITS",
    "BLOCKS",
    "PROBING",
    "WORTH_A_CAST",
    "AccuracyOption",
    "MethodOption",
    "ScaleType",
    "Settings",
    "check_scheme",
    "check_scopes",
]

ScaleType = Literal["activation", "float16"]
AccuracyOption = Literal["auto", "exact", "bf16", "int8"]
#: "auto" and "probed" are "calibrated" where there are statistics of anything, and otherwise "search".
MethodOption = Literal[Method, "auto", "probed"]
#: The methods that make do with text of the model's own, and without any where it does not write.
PROBING = ("auto", "probed")

#: Scales are stored in another type than is computed in only if that saves more bytes than this: it takes a Cast, which
#: takes some 150 to 250 bytes with its names.
WORTH_A_CAST = 256

_BYTES = {"float32": 4, "float16": 2}

BITS = (2, 3, 4, 5, 6, 8)
BLOCKS = (0, 16, 32, 64, 128, 256)
_METHODS = ("rtn", "search", "hqq", "calibrated", *PROBING)
_SCALE_TYPES = ("activation", "float16")
_ACCURACIES = ("auto", "exact", "bf16", "int8")
_SCOPE_KEYS = ("match", "bits", "block", "symmetric", "method", "scale_dtype", "accuracy")


@dataclass(frozen=True)
class Settings:
    """Options of one weight.

    Attributes:
        bits: 0 leaves the weight alone.
        block, symmetric: As in `WeightScheme`.
        method: Likewise, or one of `PROBING`.
        scale_dtype: Type of the stored scales; "activation" is the type that is computed in.
        accuracy: The least precision of products; "auto" leaves it to the lowering.
    """

    bits: int
    block: int
    symmetric: bool
    method: MethodOption
    scale_dtype: ScaleType
    accuracy: AccuracyOption = "auto"

    def in_scopes(self, scopes: Iterable[Mapping[str, Any]], names: Iterable[str]) -> Settings:
        """Return the settings changed by every scope whose pattern is found in one of the names, in order."""
        settings, names = self, list(names)
        for scope in scopes:
            if any(re.search(scope["match"], name) for name in names):
                settings = replace(settings, **{key: value for key, value in scope.items() if key != "match"})
        return settings

    def scheme(self, rows: int, columns: int, computes_in: ComputeType, *, data: bool) -> WeightScheme:
        """Return the scheme for a weight [K, N]; a block is not made longer than the column needs.

        Args:
            rows: K.
            columns: N.
            computes_in: Type of the activations.
            data: Whether there are statistics.
        """
        block = self.block
        while block > BLOCKS[1] and block // 2 >= rows:
            block //= 2
        scale_type = computes_in if self.scale_dtype == "activation" else self.scale_dtype
        found: Method = "calibrated" if data else "search"
        method: Method = found if self.method == "auto" or self.method == "probed" else self.method
        symmetric = self.symmetric or self.bits in PLANES
        accuracy: Accuracy | None = None if self.accuracy == "auto" else self.accuracy
        scheme = WeightScheme(self.bits, block, symmetric, method, scale_type, accuracy)
        saved = scheme.block_count(rows) * columns * (_BYTES[computes_in] - _BYTES[scale_type])
        return scheme if saved > WORTH_A_CAST else replace(scheme, scale_type=computes_in)


def check_scheme(values: Mapping[str, Any], where: str, *, may_be_left: bool = False) -> None:
    """Check options by name.

    Raises:
        UsageError: A value is out of range.
    """
    allowed: dict[str, tuple[Any, ...]] = {
        "bits": (0, *BITS) if may_be_left else BITS,
        "block": BLOCKS,
        "symmetric": (True, False),
        "method": _METHODS,
        "scale_dtype": _SCALE_TYPES,
        "accuracy": _ACCURACIES,
    }
    for name, value in values.items():
        if name in allowed and value not in allowed[name]:
            choices = ", ".join(str(choice) for choice in allowed[name])
            raise UsageError(f"{name} = {value!r} is not possible", where=where, todo=f"choose one of {choices}")


def check_scopes(scopes: Iterable[Mapping[str, Any]], where: str) -> None:
    """Check the scopes of a pass.

    Raises:
        UsageError: An unknown key, no pattern, or a value out of range.
    """
    for index, scope in enumerate(scopes):
        place = f"{where}.scopes[{index}]"
        for key in scope:
            if key not in _SCOPE_KEYS:
                raise UsageError(f"a scope has no option '{key}'", where=place, todo=did_you_mean(key, _SCOPE_KEYS))
        if "match" not in scope:
            raise UsageError("a scope needs a pattern", where=place, todo="write match = 'regular expression'")
        compile_patterns([scope["match"]], place)
        check_scheme(scope, place, may_be_left=True)
