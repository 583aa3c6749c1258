"""How precise each product is, and why: what the source asked for, what the user asked for, or what was measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from onnxslim_llm.concepts.block_weights import Accuracy, BlockJob
from onnxslim_llm.custom_ops.matmul_reference import DOT_ROWS
from onnxslim_llm.errors import UsageError
from onnxslim_llm.passes.lower.weights.activation_rounding import RoundingErrors, RoundingLoss
from onnxslim_llm.passes.lower.weights.codes import BlockCall
from onnxslim_llm.rewrite.context import Context

__all__ = ["AccuracyChoice", "LevelChoice", "check_largest_error"]

#: MatMulNBits' accuracy levels for products that came in with a precision of their own.
_LEVELS: dict[Accuracy, int] = {"exact": 1, "bf16": 1, "int8": 4}
_INT8_LEVEL, _FLOAT_LEVEL = 4, 1
#: Widths for which MatMulNBits has kernels that compute in float32.
_FLOAT_BITS = (4,)


def check_largest_error(largest_error: float, where: str) -> None:
    """Check the limit of what rounding may do.

    Raises:
        UsageError: It is no share of a result.
    """
    if not 0 <= largest_error <= 1:  # NaN, too
        what = f"a relative error of {largest_error} makes no sense"
        raise UsageError(what, where=f"{where}.largest_error", todo="choose one between 0 and 1")


class _Choice:
    """What was chosen so far, and the account of it."""

    def __init__(self, largest_error: float, context: Context) -> None:
        self._largest_error = largest_error
        self._errors = RoundingErrors(context.statistics, context.seed)
        self._chosen: Counter[str] = Counter()
        self._measured: list[dict[str, Any]] = []

    def _fits(self, loss: RoundingLoss) -> bool:
        return math.isfinite(loss.error) and loss.error <= self._largest_error

    def _tell(self, jobs: Sequence[BlockJob], loss: RoundingLoss, chosen: str | int, **more: Any) -> None:
        name = " + ".join(job.where() for job in jobs)
        entry = {"name": name, "int8_error": round(loss.error, 5), "rows_like": loss.rows, "chosen": chosen}
        self._measured.append({**entry, **more})

    def _account(self, name: str) -> dict[str, Any]:
        """Return the entries for `Change.detail`."""
        found: dict[str, Any] = {name: dict(sorted(self._chosen.items()))} if self._chosen else {}
        if self._measured:
            found |= {"largest_error": self._largest_error, "measured": self._measured}
        return found


class AccuracyChoice(_Choice):
    """Of MatMulPacked's precisions: int8 is the fastest, bfloat16 is fast with AMX.

    Args:
        wanted: For all products, or "auto".
        largest_error: What rounding may do to the results of a product where `wanted` is "auto".
        context: Statistics and seed.
    """

    def __init__(self, wanted: Literal["auto", "exact", "bf16", "int8"], largest_error: float, context: Context):
        super().__init__(largest_error, context)
        self._wanted = wanted

    def of(self, call: BlockCall, jobs: tuple[BlockJob, ...], *, pinned: bool) -> Accuracy:
        """Return the precision of a product.

        Args:
            call: The product.
            jobs: Its weight, or the two halves of it.
            pinned: The user wants it exact.
        """
        found: Accuracy | None = "exact" if pinned else jobs[0].accuracy
        if found is None:
            found = self._wanted if self._wanted != "auto" else self._good_enough(call, jobs)
        self._chosen[found] += 1
        return found

    def account(self) -> dict[str, Any]:
        """Return what was chosen how often, and of measured products each error, for `Change.detail`."""
        return self._account("accuracy")

    def _good_enough(self, call: BlockCall, jobs: tuple[BlockJob, ...]) -> Accuracy:
        loss = self._errors.int8(call.operand, jobs, min(DOT_ROWS, call.stored_block("nbits")))
        found: Accuracy = "int8"
        if not self._fits(loss):
            found = "bf16" if self._fits(self._errors.bf16(call.operand, jobs)) else "exact"
        self._tell(jobs, loss, found)
        return found


class LevelChoice(_Choice):
    """Of MatMulNBits' accuracy levels: 4 rounds activations to int8, the others compute in float32.

    Args:
        wanted: For all products, or "auto".
        largest_error: What rounding may do to the results of a product where `wanted` is "auto".
        context: Statistics and seed.
    """

    def __init__(self, wanted: Literal["auto", 0, 1, 2, 3, 4], largest_error: float, context: Context):
        super().__init__(largest_error, context)
        self._wanted = wanted

    def of(self, call: BlockCall) -> int:
        """Return the level of a product; bfloat16 is what an own operator or a recipe allows, where it is fast."""
        wanted = call.job.accuracy
        if wanted is not None and not (wanted == "bf16" and call.job.scheme.bits not in _FLOAT_BITS):
            found = _LEVELS[wanted]
        elif self._wanted != "auto":
            found = self._wanted
        else:
            found = self._good_enough(call)
        self._chosen[str(found)] += 1
        return found

    def account(self) -> dict[str, Any]:
        """Return what was chosen how often, and of measured products each error, for `Change.detail`."""
        return self._account("accuracy_level")

    def _good_enough(self, call: BlockCall) -> int:
        bits = call.job.scheme.bits
        loss = self._errors.int8(call.operand, (call.job,), call.stored_block("nbits"))
        if self._fits(loss):
            self._tell((call.job,), loss, _INT8_LEVEL)
            return _INT8_LEVEL
        if bits not in _FLOAT_BITS:
            self._tell((call.job,), loss, _INT8_LEVEL, why=f"{bits}-bit weights have no kernel in float32")
            return _INT8_LEVEL
        self._tell((call.job,), loss, _FLOAT_LEVEL)
        return _FLOAT_LEVEL
