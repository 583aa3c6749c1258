"""All of the group's passes, over and over until none of them finds anything."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.passes.cleanup.order import CLEANUP
from onnxslim_llm.rewrite.passes import Change, Pass, Skip
from onnxslim_llm.rewrite.registry import make_pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["Cleanup"]


@dataclass(frozen=True)
class Cleanup(Pass):
    """Run the cleanup passes in turn until a whole round changes nothing.

    So cleaning up a clean model changes nothing, and each pass may leave work for the ones before it.

    Before:
        agraph (float[N] x) => (float[N] y) {
            two = Constant <value = float {2.0}> ()
            half = Constant <value = float {0.5}> ()
            one = Mul (two, half)
            y0 = Mul (x, one)
            y = Relu (y0)
        }

    After:
        agraph (float[N] x) => (float[N] y) {
            y = Relu (x)
        }

    Skips when:
        - one of the passes skips; its reasons are passed on
    """

    name: ClassVar[str] = "cleanup"
    group: ClassVar[str] = "cleanup"

    max_rounds: int = 16

    def apply(self, model: Model, context: Context) -> Change:
        """Run rounds of `CLEANUP`.

        Raises:
            CompilerBug: The passes undo each other's work.
        """
        steps = [make_pass(name, {}) for name in CLEANUP]
        change = Change()
        counts = dict.fromkeys(CLEANUP, 0)
        settled: dict[str, int] = {}  # number of changes, of all passes together, after which a pass was done
        skipped: dict[str, list[Skip]] = {}
        seconds = dict.fromkeys(CLEANUP, 0.0)
        for round_number in range(1, self.max_rounds + 1):
            found = 0
            for step in steps:
                if settled.get(step.name) == len(change.sites):
                    continue  # nothing has changed since it ran
                start = time.perf_counter()
                step.requires(model, context)
                done = step.apply(model, context)
                step.ensures(model, context)
                seconds[step.name] += time.perf_counter() - start
                counts[step.name] += len(done.sites)
                found += len(done.sites)
                change.sites += done.sites
                settled[step.name] = len(change.sites)
                skipped[step.name] = done.skipped
            if not found:
                change.skipped = list(dict.fromkeys(skip for found_by in skipped.values() for skip in found_by))
                change.detail = _detail(counts, seconds, round_number)
                return change
        busy = ", ".join(name for name, count in counts.items() if count)
        raise CompilerBug(f"the cleanup passes do not come to an end after {self.max_rounds} rounds", where=busy)


def _detail(counts: dict[str, int], seconds: dict[str, float], rounds: int) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "sites": {name: count for name, count in counts.items() if count},
        "seconds": {name: round(spent, 4) for name, spent in seconds.items()},
    }
