"""Run passes in order, time them, and keep an account of what each one did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from onnxslim_llm.errors import CompilerBug, ModelError, SlimError
from onnxslim_llm.ir.proto.check import check_graphs
from onnxslim_llm.ir.shapes.contradictions import contradictions
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.order import check_order
from onnxslim_llm.rewrite.passes import Change, Pass, Skip
from onnxslim_llm.rewrite.registry import make_pass
from onnxslim_llm.rewrite.syntax import format_pipeline, parse_pipeline

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["Gate", "Observer", "PassRecord", "Pipeline"]


@dataclass
class PassRecord:
    """The account of one pass in a pipeline.

    Attributes:
        name: Name of the pass.
        options: Its options.
        seconds: Time that it took.
        changed: Number of sites that changed.
        skipped: Sites that it left alone, with reasons.
        nodes: Number of nodes before and after, subgraphs included.
        bytes: Bytes of distinct weights before and after.
        rolled_back: Why the pass was undone; empty if it was not.
        detail: Figures of the pass's own.
    """

    name: str
    options: dict[str, Any]
    seconds: float = 0.0
    changed: int = 0
    skipped: list[Skip] = field(default_factory=list)
    nodes: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    rolled_back: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


class Observer(Protocol):
    """Told about the progress of a pipeline."""

    def pass_started(self, index: int, total: int, step: Pass) -> None:
        """A pass is about to run."""

    def pass_finished(self, index: int, total: int, record: PassRecord, model: Model) -> None:
        """A pass has run; `model` is its result."""


class Gate(Protocol):
    """Judges the result of a pass."""

    def __call__(self, step: Pass, before: Model, after: Model) -> str:
        """Return why `after` is not acceptable, or an empty string."""


class Pipeline:
    """An ordered list of passes.

    Args:
        passes: Passes, or their textual form (see `rewrite.syntax`).

    Raises:
        UsageError: Unknown pass or option, or malformed text.
    """

    def __init__(self, passes: str | Sequence[Pass]) -> None:
        if isinstance(passes, str):
            passes = [make_pass(name, options) for name, options in parse_pipeline(passes)]
        self.passes: tuple[Pass, ...] = tuple(passes)

    def __str__(self) -> str:
        return format_pipeline([(p.name, p.options()) for p in self.passes])

    def run(
        self,
        model: Model,
        context: Context | None = None,
        *,
        observer: Observer | None = None,
        gate: Gate | None = None,
    ) -> list[PassRecord]:
        """Apply the passes to `model` in place.

        Args:
            model: The model.
            context: What the passes may know.
            observer: Told before and after each pass.
            gate: Judges each pass that changed something; a refused one is rolled back and the next one goes on.

        Returns:
            One record a pass, in order.

        Raises:
            SlimError: The order makes no sense, a pass refused to run, or failed (`CompilerBug` with its name).
        """
        check_order(self.passes)
        context = context or Context()
        records = []
        for index, step in enumerate(self.passes):
            if observer is not None:
                observer.pass_started(index, len(self.passes), step)
            context.following = self.passes[index + 1 :]
            record = _run_pass(step, model, context, gate)
            records.append(record)
            if observer is not None:
                observer.pass_finished(index, len(self.passes), record, model)
        return records


def _run_pass(step: Pass, model: Model, context: Context, gate: Gate | None) -> PassRecord:
    record = PassRecord(step.name, step.options())
    model.refresh_names()
    before = model.copy() if gate is not None or step.structural else None
    statistics, cache_ranges = context.statistics, context.cache_ranges
    nodes, size = _node_count(model), model.weight_bytes()
    start = time.perf_counter()
    try:
        step.requires(model, context)
        change: Change = step.apply(model, context)
        step.ensures(model, context)
        if change:
            _check_valid(step, model)
    except SlimError:
        raise
    except Exception as error:
        raise CompilerBug(
            f"pass '{step.name}' failed: {type(error).__name__}: {error}",
            where=step.name,
            todo="run again with -v for the traceback and report it with the model's `inspect --json`",
        ) from error
    record.seconds = time.perf_counter() - start
    record.changed, record.skipped, record.detail = len(change.sites), change.skipped, change.detail
    if before is not None and change:
        record.rolled_back = _dangling(before, model) if step.structural else ""
        if gate is not None:
            record.rolled_back = record.rolled_back or gate(step, before, model)
        if record.rolled_back:
            model.graph, model.skeleton = before.graph, before.skeleton
            context.statistics, context.cache_ranges = statistics, cache_ranges
            model.refresh_names()
    record.nodes = (nodes, _node_count(model))
    record.bytes = (size, model.weight_bytes())
    return record


def _check_valid(step: Pass, model: Model) -> None:
    try:
        check_graphs(model.graph, model.functions)
    except ModelError as error:
        raise CompilerBug(
            f"pass '{step.name}' left no valid model: {error.what}",
            where=error.where,
            todo="run again with -v for the traceback and report it with the model's `inspect --json`",
        ) from error


def _dangling(before: Model, after: Model) -> str:
    """Return which output of a model has not the shape that it declares, and had it before; nothing if none has."""
    old, new = contradictions(before), contradictions(after)
    return next((text for name, text in new.items() if name not in old), "")


def _node_count(model: Model) -> int:
    return sum(len(graph.nodes) for graph in model.graphs())
