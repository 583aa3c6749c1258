"""Compile one model: from a file to a published, verified artifact."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from onnxslim_llm import __version__
from onnxslim_llm.artifact.environment import usable_cpus
from onnxslim_llm.artifact.hashing import BackgroundHasher
from onnxslim_llm.artifact.journal import compile_identity
from onnxslim_llm.artifact.manifest import MANIFEST_NAME, REPORT_NAME, Manifest, Verify
from onnxslim_llm.artifact.sidefiles import carry_side_files
from onnxslim_llm.artifact.staging import Staging
from onnxslim_llm.compiler.account import Account, make_manifest
from onnxslim_llm.compiler.bundle import bundle_operators, check_library
from onnxslim_llm.compiler.calibration import SELF, Calibrator
from onnxslim_llm.compiler.client_files import write_client_files
from onnxslim_llm.compiler.defaults import default_output, default_recipe, rounds_activations
from onnxslim_llm.compiler.fixed_source import FixedSource, Shapes
from onnxslim_llm.compiler.fusion import FusionCensus
from onnxslim_llm.compiler.lowering import KvCache, check_opset, in_order, intake_passes, lowering_passes
from onnxslim_llm.compiler.nonfinite import NonFinite, nonfinite_weights
from onnxslim_llm.compiler.observation import make_observer
from onnxslim_llm.compiler.progress import Progress, Silent
from onnxslim_llm.compiler.verification import Judge, may_roll_back
from onnxslim_llm.errors import CompilerBug, GateError, ModelError, UsageError
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.proto.external import resolve_model_path
from onnxslim_llm.ir.save import SaveOptions, SaveReport, save_model
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.targets import Target, get_target
from onnxslim_llm.targets.base import VendorError

__all__ = ["MODEL_NAME", "CompileResult", "compile"]

MODEL_NAME = "model.onnx"
FIXED_NAME = "fixed"  # the source with fixed sizes; likewise
STATISTICS_NAME = "statistics"  # a folder of the work in progress; never part of an artifact
VerifyLevel = Literal["fast", "full", "off"]
Logits = Literal["all", "last"]


@dataclass(frozen=True)
class CompileResult:
    """A published artifact.

    Attributes:
        path: Its folder.
        manifest: What manifest.json holds.
    """

    path: Path
    manifest: Manifest


def compile(  # noqa: A001
    source: str | Path,
    out: str | Path | None = None,
    *,
    target: str = "portable",
    recipe: str | Path | Recipe | None = None,
    settings: Sequence[str] = (),
    calib: str | Path | None = None,
    jobs: int | None = None,
    memory_limit: int | None = None,
    shape: str = "",
    target_options: Mapping[str, str] | None = None,
    kv_cache: KvCache = "separate",
    add_kv_cache: bool = False,
    logits: Logits = "all",
    opset: int | None = None,
    bundle_ops: bool = False,
    verify: VerifyLevel = "fast",
    resume: bool = False,
    force: bool = False,
    statistics: str | Path | None = None,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a model and publish the artifact, or raise and leave everything as it was.

    Args:
        source: An .onnx file, or a folder with exactly one.
        out: The artifact's folder; default `<stem>.slim` in the working folder.
        target: Name of the runtime that the artifact is for.
        recipe: A preset's name, a .toml file or a recipe; default by the kind of model.
        settings: `PASS.OPTION=VALUE`, applied to the recipe.
        calib: Text or .jsonl (with the model's tokenizer beside it) or .npz/.npy inputs, for verification and for
            passes that work from statistics; "self" lets the model write the text.
        jobs: Threads for weight work and verification; default: all usable CPUs. The artifact does not depend on it.
        memory_limit: Bytes of weights in work at a time.
        shape: Sizes for symbolic dimensions, such as "batch=1,seq=128"; targets with fixed shapes need all of them.
        target_options: Options of the target's own.
        kv_cache: "separate": cache inputs and outputs as in the source. "shared": each pair is one buffer, extended in
            place. "int8": that, with int8 entries; the loss is what `verify` in the manifest says.
        add_kv_cache: Give a decoder that reads the whole text in every run a KV cache.
        logits: "last": of the last token only, which is all that generating needs.
        opset: Version of ai.onnx that the model is converted to before it is lowered to the target's operators;
            default: what the passes need.
        bundle_ops: Put the operator library beside a model that needs it, for runtimes that look for it there.
        verify: Compare source and artifact in the target's runtime: a few inputs ("fast"), many, and after every pass
            ("full"), or not at all ("off": then the source's external data are not hashed either).
        resume: Go on from an interrupted compile of the same model and recipe.
        force: Replace an existing artifact.
        statistics: A folder that keeps calibration statistics for further compiles of the same model and data; by
            default they go as soon as the weights are written.
        progress: Told what happens.

    Raises:
        UsageError: Unknown target, recipe, pass or option; the output exists.
        ModelError: The source is no valid or supported model.
        GateError: The artifact is not as good as its gates want; nothing was published.
        ResourceError: Disk, memory, permission, or a runtime that is not installed.
        CompilerBug: A pass failed.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    _check_level(verify)
    if kv_cache not in get_args(KvCache):
        raise UsageError(f"unknown kind of cache '{kv_cache}'", where="--kv-cache", todo="use separate, shared or int8")
    if logits not in get_args(Logits):
        raise UsageError(f"'{logits}' logits are unknown", where="--logits", todo="use all or last")
    path = resolve_model_path(source)
    folder = Path(source).is_dir()
    goal = get_target(target).with_options(target_options or {})
    if goal.extra:
        goal.require()  # without the vendor's tools there is no artifact: tell before work is spent
    check_opset(goal, opset)
    check_library(bundle_ops)
    chosen = _load_recipe(recipe)
    account = Account(source=path, target=goal.name, threads=jobs or usable_cpus())
    with (
        Staging(Path(out) if out else default_output(path), source=path, force=force) as staging,
        BackgroundHasher() as hasher,
    ):
        progress.stage("open")
        model = open_model(path)
        account.opened(model)
        check_opset(goal, opset, model.opset())
        shapes = Shapes.of(model, goal, shape)
        if chosen is None:
            chosen, why = default_recipe(model)
            account.note(why)
        chosen = chosen.with_fusions(_wanted_fusions(add_kv_cache, logits)).with_settings(settings)
        if chosen.gates == "lossless" and (kv_cache == "int8" or rounds_activations(model)):
            chosen = chosen.model_copy(update={"gates": "int8"})
        account.recipe = chosen
        data = account.source_data
        staging.begin(compile_identity(path, data, _identity(goal, chosen, kv_cache, opset, shapes)), resume=resume)
        weights = [os.path.relpath(f.resolve(), path.parent.resolve()) for f in data]
        if verify == "off":  # without proof wanted, the weights need not be read once more for their hash
            source_hashes = hasher.submit(path.parent, [path.name], weights)
        else:
            source_hashes = hasher.submit(path.parent, [path.name, *weights])
        account.notes += staging.notes
        given = Path(calib) if calib else None
        kept = Path(statistics) if statistics is not None else staging.directory / STATISTICS_NAME
        calibrator = Calibrator(path, given, kept, account.threads, progress)
        text = given if given and str(given) != SELF and given.suffix != ".jsonl" else None
        fixed = None
        if shapes.text:
            fixed = FixedSource(path, shapes, staging.directory / FIXED_NAME, account.threads)
            samples = fixed.samples(calibrator.tokens())
            calibrator = replace(calibrator, source=fixed.path, data=samples or given)
            text = samples or text
        runs_as = fixed.path if fixed else path
        judge = Judge(runs_as, goal, chosen, verify, text, account.threads, progress, calibrator)
        lowering = shapes.for_lowering(lowering_passes(goal, kv_cache, opset))
        passes = [*shapes.passes(), *intake_passes(goal), *in_order(chosen.build(), lowering)]
        job = _Job(passes, goal, staging, account, progress, judge, calibrator, memory_limit)
        try:
            verified = job.run(model)
        except VendorError as error:
            error.todo = f"{error.todo}; its log is {staging.keep_log(error.log)}"
            raise
        if kv_cache == "int8" and verified is not None and verified.kl_mean is not None:
            exact = all(step.lossless for step in chosen.build())
            what = "the int8 KV cache costs" if exact else "the recipe and the int8 KV cache cost"
            account.note(f"{what} a mean KL divergence of {verified.kl_mean:.2g}")
        if statistics is None:
            calibrator.discard()
        quality = judge.measure(staging.directory / MODEL_NAME)
        account.layers = judge.diagnose(account.layers, staging.directory / MODEL_NAME)
        if fixed is not None:
            fixed.discard()
        written, remarks = write_client_files(staging.directory / MODEL_NAME, path.parent)
        carried, notes = carry_side_files(path.parent, staging.directory, only_known=not folder)
        bundled, needs = bundle_operators(staging.directory / MODEL_NAME, bundle_ops)
        account.notes += [*remarks, *notes, *needs, *judge.notes, *calibrator.notes]
        progress.stage("report")
        manifest = make_manifest(
            account,
            staging.directory,
            source_hashes.result(),
            artifact_names=job.report_names,
            carried=[*written, *carried, *bundled],
            verify=verified,
            quality=quality,
            seconds=time.perf_counter() - start,
        )
        if manifest.failed_gates:
            raise _gate_error(manifest, staging, judge.guilty or str(path))
        _write_report(manifest, staging.directory)
        return CompileResult(staging.publish(), manifest)


def _gate_error(manifest: Manifest, staging: Staging, where: str) -> GateError:
    beside, failed = staging.reject(manifest), manifest.failed_gates
    first = failed[0]
    value, limit = ("not measured" if figure is None else f"{figure:.4g}" for figure in (first.value, first.limit))
    error = GateError(
        f"the artifact missed {len(failed)} gate(s), first {first.name}: {value} where {first.comparison} "
        f"{limit} is wanted; nothing was published",
        where=where,
        todo=f"see {beside}; a gentler recipe (int8), a smaller block or more bits for the worst layers may pass",
    )
    error.manifest = manifest
    return error


def _does_not_run(guilty: Pass, error: ModelError) -> CompilerBug:
    return CompilerBug(
        f"the artifact does not run: {error.what}",
        where=f"pass '{guilty.name}'",
        todo="leave this pass out of the recipe, and report it with the model's `inspect --json`",
    )


def _load_recipe(recipe: str | Path | Recipe | None) -> Recipe | None:
    return recipe if recipe is None or isinstance(recipe, Recipe) else Recipe.load(recipe)


def _wanted_fusions(add_kv_cache: bool, logits: Logits) -> list[str]:
    """Return the passes that change what the model takes and gives, as the user asked for."""
    wanted = ["add_kv_cache", "cleanup"] if add_kv_cache else []
    return [*wanted, "keep_last_logits"] if logits == "last" else wanted


def _identity(
    target: Target, recipe: Recipe, kv_cache: KvCache, opset: int | None, shapes: Shapes
) -> dict[str, object]:
    identity = {"version": __version__, "target": target.name, "lowering": target.lowering}
    return {**identity, "recipe": recipe.resolved(), "kv_cache": kv_cache, "opset": opset, "shape": shapes.text}


def _write_report(manifest: Manifest, directory: Path) -> None:
    from onnxslim_llm.report.html import render_report  # the plots' library loads only where a report is written

    manifest.write(directory / MANIFEST_NAME)
    (directory / REPORT_NAME).write_text(render_report(manifest), encoding="utf-8")


@dataclass
class _Job:
    """Passes, save and verification, repeated without a lossless pass that turns out to be guilty."""

    passes: list[Pass]
    target: Target
    staging: Staging
    account: Account
    progress: Progress
    judge: Judge
    calibrator: Calibrator
    memory_limit: int | None
    report_names: list[str] = field(default_factory=list)

    def run(self, model: Model) -> Verify | None:
        rolled_back: dict[str, str] = {}
        while True:
            records = self._transform(model, rolled_back)
            report = self._save(model)
            self.account.finished(model, report, records)
            bad = nonfinite_weights(model)
            for weight in bad:
                self.account.note(f"{weight}; they are kept as they are")
            active = [p for p in self.passes if p.name not in rolled_back]
            verified, broken = self._judge(bad)
            if broken is None and (verified is None or all(gate.ok for gate in verified.gates)):
                return verified
            guilty = self.judge.find_guilty(active)
            if guilty is None or not may_roll_back(guilty):
                if broken is not None:
                    raise broken if guilty is None else _does_not_run(guilty, broken)
                return verified
            failed = "" if verified is None else next(gate.name for gate in verified.gates if not gate.ok)
            reason = (
                f"the artifact missed '{failed}' with it" if broken is None else "the artifact does not run with it"
            )
            rolled_back[guilty.name] = reason
            self._tell_rolled_back(guilty.name, reason)
            model = open_model(self.account.source)

    def _judge(self, bad: list[NonFinite]) -> tuple[Verify | None, ModelError | None]:
        """Return the verification's result, or the error that stopped it."""
        try:
            return self.judge.judge(self.staging.directory / MODEL_NAME), None
        except ModelError as error:
            if bad:
                error.where = "; ".join(filter(None, [str(bad[0]), error.where]))  # most probably the reason
            return None, error

    def _transform(self, model: Model, rolled_back: dict[str, str]) -> list[PassRecord]:
        active = [p for p in self.passes if p.name not in rolled_back]
        context = Context(
            target=self.target,
            statistics=self.calibrator.wanted_by(active),
            cache_ranges=self.calibrator.cache_ranges_wanted_by(active),
            observer=make_observer(self.calibrator),
        )
        self.progress.stage("passes", len(active), "passes")
        census = FusionCensus(active, model)
        relay = _Relay(self.progress, census)
        records = Pipeline(active).run(model, context, observer=relay, gate=self.judge.pass_gate())
        self.account.fusion = census.reports
        self.account.notes += [n for n in context.notes if n not in self.account.notes]
        for record in records:
            if record.rolled_back:
                self._tell_rolled_back(record.name, record.rolled_back)
        undone = [
            PassRecord(p.name, p.options(), rolled_back=rolled_back[p.name])
            for p in self.passes
            if p.name in rolled_back
        ]
        return [*records, *undone]

    def _tell_rolled_back(self, name: str, reason: str) -> None:
        text = f"pass '{name}' is rolled back: {reason}"
        self.account.note(text)
        self.progress.note(text)

    def _save(self, model: Model) -> SaveReport:
        self.progress.stage("weights", model.weight_bytes(), "bytes")
        options = SaveOptions(jobs=self.account.threads, memory_limit=self.memory_limit)
        destination = self.staging.directory / MODEL_NAME
        report = save_model(
            model,
            destination,
            options,
            progress=lambda done, total: self.progress.advance(done),
            journal=self.staging.journal,
        )
        for file in report.files:
            self.staging.written(file)
        self.report_names = [os.path.relpath(f, self.staging.directory) for f in report.files]
        if self.target.extra:
            self.progress.stage("compile for the device", None)
        finished = self.target.finish(destination, threads=self.account.threads)
        self.report_names += finished.files
        for note in finished.notes:
            self.account.note(note)
        return report


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


def _check_level(level: str) -> None:
    if level not in ("fast", "full", "off"):
        raise UsageError(f"unknown verification level '{level}'", where="--verify", todo="use fast, full or off")
