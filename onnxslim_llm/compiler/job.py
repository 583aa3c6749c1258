"""From the open source to written and verified graphs; again without a pass that turns out to be guilty."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from onnxslim_llm.artifact.manifest import Verify
from onnxslim_llm.artifact.staging import Staging
from onnxslim_llm.compiler.account import Account
from onnxslim_llm.compiler.fusion import FusionCensus
from onnxslim_llm.compiler.graphs import GraphPlan
from onnxslim_llm.compiler.legality import check_legal
from onnxslim_llm.compiler.nonfinite import NonFinite, nonfinite_weights
from onnxslim_llm.compiler.observation import make_gradient_source, make_observer, make_replayer, make_tuner
from onnxslim_llm.compiler.product_timer import RuntimeTimer
from onnxslim_llm.compiler.progress import Progress
from onnxslim_llm.compiler.text_tokens import TextTokens
from onnxslim_llm.compiler.verification import may_roll_back
from onnxslim_llm.errors import CompilerBug, ModelError
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.save import SaveOptions, SaveReport, save_models
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.stats.shared_ranges import SharedRanges
from onnxslim_llm.targets import Target

__all__ = ["Job"]


@dataclass
class Job:
    """Passes, save and verification of all graphs of an artifact.

    Attributes:
        graphs: The first one's account is the artifact's; statistics are its own, so that weights become the same.
        target: Where they will run.
        staging: Where they are written.
        account: Told everything.
        progress: Likewise.
        memory_limit: Bytes of weights in work at a time.
        report_names: Files that belong to the model.
    """

    graphs: Sequence[GraphPlan]
    target: Target
    staging: Staging
    account: Account
    progress: Progress
    memory_limit: int | None
    report_names: list[str] = field(default_factory=list)
    _timer: RuntimeTimer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._timer = RuntimeTimer(self.target, self.account.threads, self.progress)

    def run(self, source: Model) -> list[Verify | None]:
        """Make and verify the graphs; without what broke them, if that may be left out.

        Args:
            source: The open source; it is changed.

        Returns:
            The result of each graph; gates may have failed.

        Raises:
            ModelError: The source cannot be run, or an artifact cannot.
            GateError: The target does not accept what came out.
            CompilerBug: A pass failed.
        """
        rolled_back: dict[str, str] = {}
        while True:
            models = [source, *(source.copy() for _ in self.graphs[1:])]
            shared = SharedRanges() if len(self.graphs) > 1 else None
            records = [
                self._transform(graph, model, rolled_back, shared)
                for graph, model in zip(self.graphs, models, strict=True)
            ]
            report = self._save(models)
            self.account.finished(models[0], report, records[0])
            bad = nonfinite_weights(models[0])
            for weight in bad:
                self.account.note(f"{weight}; they are kept as they are")
            results: list[Verify | None] = []
            for graph in self.graphs:
                verified, broken = self._judge(graph, bad)
                results.append(verified)
                if broken is not None or not _passes(verified):
                    break
            if broken is None and _passes(verified):
                return results
            guilty = graph.judge.find_guilty([p for p in graph.passes if p.name not in rolled_back])
            if guilty is None or not may_roll_back(guilty, broken=broken is not None):
                if broken is not None:
                    raise broken if guilty is None else _does_not_run(guilty, broken)
                return results
            failed = "" if verified is None else next(gate.name for gate in verified.gates if not gate.ok)
            reason = (
                f"the artifact missed '{failed}' with it" if broken is None else "the artifact does not run with it"
            )
            rolled_back[guilty.name] = reason
            self._tell_rolled_back(guilty.name, reason)
            source = open_model(self.account.source)

    def _judge(self, graph: GraphPlan, bad: list[NonFinite]) -> tuple[Verify | None, ModelError | None]:
        """Return the verification's result, or the error that stopped it."""
        try:
            return graph.judge.judge(graph.path(self.staging.directory)), None
        except ModelError as error:
            if bad:
                error.where = "; ".join(filter(None, [str(bad[0]), error.where]))  # most probably the reason
            return None, error

    def _transform(
        self, graph: GraphPlan, model: Model, rolled_back: dict[str, str], shared: SharedRanges | None
    ) -> list[PassRecord]:
        active = [p for p in graph.passes if p.name not in rolled_back]
        first = self.graphs[0]
        context = Context(
            target=self.target,
            statistics=first.calibrator.wanted_by(active),
            cache_ranges=first.calibrator.cache_ranges_wanted_by(active),
            observer=make_observer(graph.calibrator),
            gradients=make_gradient_source(graph.calibrator),
            tuner=make_tuner(graph.calibrator),
            replayer=make_replayer(first.calibrator),
            timer=self._timer,
            shared_ranges=shared,
            tokens=TextTokens(first.calibrator),
        )
        stage = "passes" if len(self.graphs) == 1 else f"passes ({graph.shape.name})"
        self.progress.stage(stage, len(active), "passes")
        census = FusionCensus(active, model)
        relay = _Relay(self.progress, census)
        records = Pipeline(active).run(model, context, observer=relay, gate=graph.judge.pass_gate())
        if graph is first:
            self.account.fusion = census.reports
        self.account.notes += [n for n in context.notes if n not in self.account.notes]
        for record in records:
            if record.rolled_back:
                self._tell_rolled_back(record.name, record.rolled_back)
        told = check_legal(model, self.target, self.account.source)
        self.account.notes += [note for note in told if note not in self.account.notes]
        undone = [
            PassRecord(p.name, p.options(), rolled_back=rolled_back[p.name])
            for p in graph.passes
            if p.name in rolled_back
        ]
        return [*records, *undone]

    def _tell_rolled_back(self, name: str, reason: str) -> None:
        text = f"pass '{name}' is rolled back: {reason}"
        self.account.note(text)
        self.progress.note(text)

    def _save(self, models: Sequence[Model]) -> SaveReport:
        self.progress.stage("weights", models[0].weight_bytes(), "bytes")
        files = [graph.path(self.staging.directory) for graph in self.graphs]
        report = save_models(
            dict(zip(files, models, strict=True)),
            SaveOptions(jobs=self.account.threads, memory_limit=self.memory_limit),
            progress=lambda done, total: self.progress.advance(done),
            journal=self.staging.journal,
        )
        for file in report.files:
            self.staging.written(file)
        self.report_names = [os.path.relpath(f, self.staging.directory) for f in report.files]
        if self.target.extra:
            self.progress.stage("compile for the device", None)
        steps = [self.target.finish(file, threads=self.account.threads) for file in files]
        if len(files) > 1:
            steps.append(self.target.finish_together(files, threads=self.account.threads))
        for finished in steps:
            self.report_names += finished.files
            for note in finished.notes:
                self.account.note(note)
        return report


def _passes(verified: Verify | None) -> bool:
    return verified is None or all(gate.ok for gate in verified.gates)


def _does_not_run(guilty: Pass, error: ModelError) -> CompilerBug:
    return CompilerBug(
        f"the artifact does not run: {error.what}",
        where=f"pass '{guilty.name}'",
        todo="leave this pass out of the recipe, and report it with the model's `inspect --json`",
    )


class _Relay:
    """Hands the pipeline's progress on."""

    def __init__(self, progress: Progress, census: FusionCensus) -> None:
        self._progress = progress
        self._census = census

    def pass_started(self, index: int, total: int, step: Pass) -> None:
        self._progress.advance(index, step.name)

    def pass_finished(self, index: int, total: int, record: PassRecord, model: Model) -> None:
        self._census.pass_finished(index, record, model)
        self._progress.advance(index + 1, record.name)
        self._progress.pass_finished(record)
