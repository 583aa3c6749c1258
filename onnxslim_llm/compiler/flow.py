"""Compile one model: from a file to a published, verified artifact."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal, get_args

from threadpoolctl import threadpool_limits

from onnxslim_llm import __version__
from onnxslim_llm.artifact.environment import usable_cpus
from onnxslim_llm.artifact.hashing import BackgroundHasher
from onnxslim_llm.artifact.journal import compile_identity
from onnxslim_llm.artifact.manifest import MANIFEST_NAME, REPORT_NAME, GraphEntry, Manifest, Verify
from onnxslim_llm.artifact.sidefiles import carry_side_files
from onnxslim_llm.artifact.staging import Staging
from onnxslim_llm.compiler.account import Account, make_manifest
from onnxslim_llm.compiler.bundle import bundle_operators, check_library
from onnxslim_llm.compiler.calibration import SELF, Calibrator
from onnxslim_llm.compiler.client_files import write_client_files
from onnxslim_llm.compiler.config_file import config_changes
from onnxslim_llm.compiler.defaults import default_output, default_recipe, remedy_of, rounds_activations
from onnxslim_llm.compiler.fixed_source import FixedSource, Shapes
from onnxslim_llm.compiler.graphs import MODEL_NAME, GraphPlan, GraphShape, parse_graphs, shapes_of
from onnxslim_llm.compiler.job import Job
from onnxslim_llm.compiler.lowering import KvCache, check_opset, in_order, intake_passes, lowering_passes
from onnxslim_llm.compiler.observation import text_of_steps
from onnxslim_llm.compiler.pair import check_pair
from onnxslim_llm.compiler.progress import Progress, Silent
from onnxslim_llm.compiler.verification import Judge
from onnxslim_llm.errors import GateError, ModelError, UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.proto.external import resolve_model_path
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.runtime.genai_config import GENAI_CONFIG_NAME
from onnxslim_llm.targets import Target, get_target
from onnxslim_llm.targets.base import VendorError

__all__ = ["MODEL_NAME", "CompileResult", "compile"]

FIXED_NAME = "fixed"  # folders of the work in progress with the source with fixed sizes
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
    shape: str | Sequence[str] = "",
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
            ["batch=1", "prefill:seq=128,past=0", "decode:seq=1,past=511"] makes two graphs that share their weights.
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
        threadpool_limits(limits=account.threads, user_api="blas"),
    ):
        progress.stage("open")
        model = open_model(path)
        if not model.graph.outputs:  # all of it would be dead code
            where = f"graph '{model.graph.name}'"
            raise ModelError("the graph has no output", where=where, todo="the model is invalid: export it again")
        account.opened(model)
        check_opset(goal, opset, model.opset())
        graphs = parse_graphs(shape)
        shapes = shapes_of(model, goal, graphs)
        if chosen is None:
            chosen, why = default_recipe(model, goal)
            account.note(why)
        chosen = chosen.with_fusions(_wanted_fusions(add_kv_cache, logits)).with_settings(settings)
        if chosen.gates == "lossless" and (kv_cache == "int8" or rounds_activations(model)):
            chosen = chosen.model_copy(update={"gates": "int8"})
        account.recipe = chosen
        data = account.source_data
        staging.begin(compile_identity(path, data, _identity(goal, chosen, kv_cache, opset, graphs)), resume=resume)
        weights = [os.path.relpath(f.resolve(), path.parent.resolve()) for f in data]
        if verify == "off":  # without proof wanted, the weights need not be read once more for their hash
            source_hashes = hasher.submit(path.parent, [path.name], weights)
        else:
            source_hashes = hasher.submit(path.parent, [path.name, *weights])
        account.notes += staging.notes
        given = Path(calib) if calib else None
        kept = Path(statistics) if statistics is not None else staging.directory / STATISTICS_NAME
        base = Calibrator(path, given, kept, account.threads, progress)
        plans = [
            _plan(graph, sizes, goal, chosen, verify, base, staging, lowering_passes(goal, kv_cache, opset))
            for graph, sizes in zip(graphs, shapes, strict=True)
        ]
        job = Job(plans, goal, staging, account, progress, memory_limit)
        judge, calibrator = plans[0].judge, plans[0].calibrator
        try:
            results = job.run(model)
        except VendorError as error:
            error.todo = f"{error.todo}; its log is {staging.keep_log(error.log)}"
            raise
        verified = results[0]
        if kv_cache == "int8" and verified is not None and verified.kl_mean is not None:
            exact = all(step.lossless for step in chosen.build())
            what = "the int8 KV cache costs" if exact else "the recipe and the int8 KV cache cost"
            account.note(f"{what} a mean KL divergence of {verified.kl_mean:.2g}")
        if statistics is None:
            calibrator.discard()
        quality = judge.measure(staging.directory / MODEL_NAME)
        account.layers = judge.diagnose(account.layers, staging.directory / MODEL_NAME)
        generation = None
        if len(plans) > 1 and len(results) == len(plans) and all(map(_is_fine, results)):
            progress.stage("verify (both graphs)", None, "tokens")
            tokens = base.tokens()
            assert verified is not None
            generation, gate = check_pair(path, plans, staging.directory, goal, chosen, tokens, account.threads)
            verified = verified.model_copy(update={"gates": [*verified.gates, gate]})
        for plan in plans:
            if plan.fixed is not None:
                plan.fixed.discard()
        changes = config_changes(account.passes)
        written, remarks = write_client_files(staging.directory / MODEL_NAME, path.parent, changes)
        stale = [GENAI_CONFIG_NAME] if changes else []
        carried, notes = carry_side_files(path.parent, staging.directory, only_known=not folder, stale=stale)
        bundled, needs = bundle_operators(staging.directory / MODEL_NAME, bundle_ops)
        told = [note for plan in plans for note in (*plan.judge.notes, *plan.calibrator.notes)]
        account.notes += dict.fromkeys([*remarks, *notes, *needs, *told])
        progress.stage("report")
        manifest = make_manifest(
            account,
            staging.directory,
            source_hashes.result(),
            artifact_names=job.report_names,
            carried=[*written, *carried, *bundled],
            verify=verified,
            quality=quality,
            graphs=_graph_entries(plans, [verified, *results[1:]]),
            generation=generation,
            seconds=time.perf_counter() - start,
        )
        if manifest.failed_gates:
            guilty = next((plan.judge.guilty for plan in plans if plan.judge.guilty), str(path))
            operators = manifest.source.ops
            remedy = remedy_of(chosen, goal, with_data=given is not None, operators=operators)
            raise _gate_error(manifest, staging, guilty, remedy)
        _write_report(manifest, staging.directory)
        return CompileResult(staging.publish(), manifest)


def _gate_error(manifest: Manifest, staging: Staging, where: str, remedy: str) -> GateError:
    beside, failed = staging.reject(manifest), manifest.failed_gates
    first = failed[0]
    value, limit = ("not measured" if figure is None else f"{figure:.4g}" for figure in (first.value, first.limit))
    error = GateError(
        f"the artifact missed {len(failed)} gate(s), first {first.name}: {value} where {first.comparison} "
        f"{limit} is wanted; nothing was published",
        where=where,
        todo=f"see {beside}; {remedy}",
    )
    error.manifest = manifest
    return error


def _load_recipe(recipe: str | Path | Recipe | None) -> Recipe | None:
    return recipe if recipe is None or isinstance(recipe, Recipe) else Recipe.load(recipe)


def _wanted_fusions(add_kv_cache: bool, logits: Logits) -> list[str]:
    """Return the passes that change what the model takes and gives, as the user asked for."""
    wanted = ["add_kv_cache", "cleanup"] if add_kv_cache else []
    return [*wanted, "keep_last_logits"] if logits == "last" else wanted


def _plan(
    graph: GraphShape,
    shapes: Shapes,
    target: Target,
    recipe: Recipe,
    verify: VerifyLevel,
    base: Calibrator,
    staging: Staging,
    lowering: list[Pass],
) -> GraphPlan:
    """Return how one graph is made, with inputs of its own sizes; the source with these sizes is written."""
    given = base.data
    text = given if given and str(given) != SELF and given.suffix != ".jsonl" else None
    fixed, calibrator = None, base
    if shapes.text:
        folder = staging.directory / "-".join(filter(None, [FIXED_NAME, graph.name]))
        fixed = FixedSource(base.source, shapes, folder, base.threads)
        steps_text = text_of_steps(base, recipe.build()) if fixed.has_caches else None
        samples = fixed.samples(steps_text)
        free = base if given is None else None
        calibrator = replace(base, source=fixed.path, data=samples or given, notes=[*base.notes], any_size=free)
        text = samples or text
    judge = Judge(calibrator.source, target, recipe, verify, text, base.threads, base.progress, calibrator)
    steps = in_order(recipe.build(), shapes.for_lowering(lowering))
    return GraphPlan(graph, [*shapes.passes(), *intake_passes(target), *steps], judge, calibrator, fixed)


def _is_fine(result: Verify | None) -> bool:
    return result is not None and all(gate.ok for gate in result.gates)


def _graph_entries(plans: Sequence[GraphPlan], results: Sequence[Verify | None]) -> list[GraphEntry]:
    """Return what the manifest says of each graph, where there are several."""
    if len(plans) < 2:
        return []
    shapes = [plan.shape for plan in plans]
    return [
        GraphEntry(name=shape.name, path=shape.file, sizes=shape.sizes, verify=result)
        for shape, result in zip_longest(shapes, results[: len(shapes)])
    ]


def _identity(
    target: Target, recipe: Recipe, kv_cache: KvCache, opset: int | None, graphs: Sequence[GraphShape]
) -> dict[str, object]:
    identity = {"version": __version__, "target": target.name, "lowering": target.lowering}
    sizes = ";".join(":".join(filter(None, [graph.name, graph.sizes])) for graph in graphs)
    return {**identity, "recipe": recipe.resolved(), "kv_cache": kv_cache, "opset": opset, "shape": sizes}


def _write_report(manifest: Manifest, directory: Path) -> None:
    from onnxslim_llm.report.html import render_report  # the plots' library loads only where a report is written

    manifest.write(directory / MANIFEST_NAME)
    (directory / REPORT_NAME).write_text(render_report(manifest), encoding="utf-8")


def _check_level(level: str) -> None:
    if level not in ("fast", "full", "off"):
        raise UsageError(f"unknown verification level '{level}'", where="--verify", todo="use fast, full or off")
