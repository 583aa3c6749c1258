"""Qualcomm's Hexagon Tensor Processor: compiled by the vendor's own compiler, run on the device or in its simulator."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from onnxslim_llm.bounded import Outcome, run_bounded
from onnxslim_llm.errors import UsageError, did_you_mean
from onnxslim_llm.targets.base import Finished, Target, VendorError, Violation
from onnxslim_llm.targets.htp_lint import htp_violations
from onnxslim_llm.targets.htp_rules import HTP_RULES
from onnxslim_llm.targets.native_output import stdout_to_stderr
from onnxslim_llm.targets.qnn_provider import EXTRA, PACKAGE, PROVIDER, qnn_options

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.runtime.session import Session

__all__ = ["CONTEXT_NAME", "PLACEMENT_NAME", "QNN_HTP", "QnnHtpTarget"]

#: Of model.onnx: the model that names the compiled binary, which lies beside it, and the list of nodes by device. The
#: graph decode.onnx has decode_ctx.onnx and decode_placement.json.
CONTEXT_NAME = "model_ctx.onnx"
PLACEMENT_NAME = "placement.json"
_MAIN = "model"
_WORKER = "onnxslim_llm.targets.qnn_worker"
_SECONDS = 1800.0
_SHOWN = 5
_CPU = "CPUExecutionProvider"
_DEVICES = {PROVIDER: "NPU", _CPU: "CPU"}

_DEFAULTS = {
    "htp_arch": "75",
    "soc_model": "0",
    "htp_graph_finalization_optimization_mode": "3",
    "htp_performance_mode": "burst",
}
#: What the plug-in takes; of anything else it warns in its log and goes on with a default.
_CHOICES = {
    "htp_arch": ("0", "68", "69", "73", "75", "79", "81"),
    "htp_graph_finalization_optimization_mode": ("0", "1", "2", "3"),
    "htp_performance_mode": (
        *("default", "burst", "balanced", "low_balanced", "high_performance", "sustained_high_performance"),
        *("power_saver", "low_power_saver", "high_power_saver", "extreme_power_saver"),
    ),
}
_SOC = re.compile(r"\d+|[A-Z]+\d+\w*")
#: Options that are ours, not the plug-in's.
_OWN = ("seconds", "share_weights")
_FELL_BACK = "assigned to the default CPU EP"
_UNSUPPORTED = re.compile(r"\{ name: (?P<name>.*?), type: (?P<op>\w+) \}")
_REASON = re.compile(r"OrtNodeUnit \((?P<op>\w+)\)[^\n]*\n\s*REASON : (?P<reason>[^\n]*)")
_INVALID = re.compile(r"failed for node `(?P<name>[^`]*)` of type `(?P<op>\w+)` with error code (?P<code>\d+)")


@dataclass(frozen=True)
class QnnHtpTarget(Target):
    """ONNX Runtime with Qualcomm's plug-in.

    Attributes:
        provider_options: Of the plug-in.
        seconds: Time limit of the vendor's compiler.
        share_weights: Also write one binary for both graphs of a pair.
    """

    provider_options: Mapping[str, str] = field(default_factory=lambda: dict(_DEFAULTS))
    seconds: float = _SECONDS
    share_weights: bool = False

    def with_options(self, options: Mapping[str, str]) -> Target:
        """Return the target for another processor, with another time limit ("seconds"), or "share_weights".

        Raises:
            UsageError: Unknown option.
        """
        known = {*_DEFAULTS, *_OWN}
        for name, value in options.items():
            if name not in known:
                what = f"target '{self.name}' has no option '{name}'"
                raise UsageError(what, where="--target-option", todo=did_you_mean(name, known))
            if name == "seconds" and not (value.isdecimal() and int(value)):
                todo = "give a whole number above 0"
                raise UsageError(f"'{value}' is no number of seconds", where="--target-option seconds", todo=todo)
            if value not in _CHOICES.get(name, (value,)):
                todo = f"choose one of {', '.join(_CHOICES[name])}"
                raise UsageError(f"Qualcomm's plug-in knows no {name} '{value}'", where="--target-option", todo=todo)
            if name == "soc_model" and not _SOC.fullmatch(value):
                todo = "give its number, such as 69, or its name, such as SM8750; 0 is none"
                raise UsageError(f"'{value}' is no chip", where="--target-option soc_model", todo=todo)
            if name == "share_weights" and value not in ("0", "1"):
                todo = "1 also writes one binary for both graphs of a pair"
                raise UsageError(f"'{value}' is neither 0 nor 1", where="--target-option share_weights", todo=todo)
        chosen = {k: v for k, v in options.items() if k not in _OWN}
        return replace(
            self,
            provider_options={**self.provider_options, **chosen},
            seconds=float(options.get("seconds", self.seconds)),
            share_weights=options.get("share_weights", "1" if self.share_weights else "0") == "1",
        )

    def lint(self, model: Model) -> list[Violation]:
        """Return everything in the model that the target does not accept; empty for an artifact."""
        return [*super().lint(model), *htp_violations(model)]

    def finish(self, artifact: Path, *, threads: int = 0) -> Finished:
        """Compile the model for the processor, with no node left to the CPU.

        Raises:
            ResourceError: The vendor's package is not installed.
            VendorError: The compiler fails, takes too long, or leaves nodes to the CPU; these are listed.
        """
        self.require()
        context = _context_of(artifact)
        outcome = self._compile(artifact, context, threads, "errors")
        if not outcome.finished:
            raise self._failure(artifact, context, threads, outcome)
        placement = {_DEVICES.get(name, name): nodes for name, nodes in outcome.answer["placement"].items()}
        listing = {"options": dict(self.provider_options), "nodes": placement}
        listed = PLACEMENT_NAME if artifact.stem == _MAIN else f"{artifact.stem}_{PLACEMENT_NAME}"
        (artifact.parent / listed).write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")
        binaries = sorted(file.name for file in artifact.parent.glob(f"{context.stem}*.bin"))
        on_npu, total = len(placement.get("NPU", ())), sum(map(len, placement.values()))
        note = f"Qualcomm's compiler placed {on_npu} of {total} nodes on the NPU ({listed})"
        return Finished((context.name, *binaries, listed), (note,))

    def finish_together(self, artifacts: Sequence[Path], *, threads: int = 0) -> Finished:
        """Compile the graphs once more into one binary that holds their weights once, if the option asks for it.

        Devices load it; the simulator does not (QNN_COMMON_ERROR_NOT_SUPPORTED), so that what verification runs is each
        graph's own binary.

        Raises:
            VendorError: The compiler fails or takes too long.
        """
        if not self.share_weights:
            return Finished()
        contexts = [artifact.with_name(f"{artifact.stem}_shared_ctx.onnx") for artifact in artifacts]
        outcome = self._run(list(zip(artifacts, contexts, strict=True)), threads, "errors")
        if not outcome.finished:
            raise self._ended(outcome)
        folder = artifacts[0].parent
        binaries = sorted(file.name for context in contexts for file in folder.glob(f"{context.stem}*.bin"))
        size = sum((folder / name).stat().st_size for name in binaries)
        note = f"both graphs in one binary for devices: {', '.join(binaries)}, {size} bytes (not run here)"
        return Finished((*(context.name for context in contexts), *binaries), (note,))

    def open(self, path: str | Path, *, threads: int = 0) -> Session:
        """Open what the vendor's compiler made of a model, or the model itself where it was not compiled yet.

        Raises:
            ModelError: The runtime refuses the model; nodes that would fall back to the CPU are an error.
            ResourceError: The runtime is not installed.
        """
        from onnxslim_llm.runtime.session import open_with_options  # loads the runtime

        self.require()
        path = Path(path)
        compiled = _context_of(path)
        options = qnn_options(self.provider_options, {"session.disable_cpu_ep_fallback": "1"})
        options.intra_op_num_threads = threads
        return open_with_options(compiled if compiled.is_file() else path, options, around=stdout_to_stderr)

    def _compile(self, artifact: Path, context: Path, threads: int, log: str) -> Outcome:
        return self._run([(artifact, context)], threads, log)

    def _run(self, pairs: Sequence[tuple[Path, Path]], threads: int, log: str) -> Outcome:
        """Compile models into contexts; several of them into one binary."""
        request = {
            "models": [str(artifact.resolve()) for artifact, _ in pairs],
            "contexts": [str(context.resolve()) for _, context in pairs],
            "provider_options": dict(self.provider_options),
            "threads": threads,
            "log": log,
        }
        outcome = run_bounded(_WORKER, request, seconds=self.seconds)
        if not outcome.finished:
            for _, context in pairs:
                for file in context.parent.glob(f"{context.stem}*"):
                    file.unlink()
        return outcome

    def _failure(self, artifact: Path, context: Path, threads: int, outcome: Outcome) -> VendorError:
        """Return why the compiler failed, with the nodes that it did not take."""
        refused: list[str] = []
        if _FELL_BACK in outcome.log or _INVALID.search(outcome.log):
            outcome = self._compile(artifact, context, threads, "everything")  # it gives reasons only then
            refused = refused_nodes(outcome.log, _unnamed(artifact))
        if refused:
            what = f"{len(refused)} node(s) would run on the CPU: {'; '.join(refused[:_SHOWN])}"
            todo = (
                "write it with other operators, or compute it outside of the model (cut the graph there); "
                "`onnxslim-llm targets qnn-htp --lint-only MODEL` names the nearest form where one is known"
            )
            return self._error(what, todo, outcome)
        return self._ended(outcome)

    def _ended(self, outcome: Outcome) -> VendorError:
        """Return how the compiler ended."""
        if outcome.ended.startswith("timed out"):
            what, todo = f"Qualcomm's compiler {outcome.ended}", "--target-option seconds=N gives it more time"
        else:
            last = next((line for line in reversed(outcome.log.splitlines()) if line.strip()), "it said nothing")
            what, todo = f"Qualcomm's compiler failed ({outcome.ended}): {last.strip()}", "see its log"
        return self._error(what, todo, outcome)

    def _error(self, what: str, todo: str, outcome: Outcome) -> VendorError:
        error = VendorError(f"{what}; nothing was published", where=f"target '{self.name}'", todo=todo)
        error.log = outcome.log
        return error


def _context_of(artifact: Path) -> Path:
    """Return the file that names what the compiler makes of a model: `CONTEXT_NAME` for model.onnx."""
    return artifact.with_name(f"{artifact.stem}_ctx.onnx")


def _unnamed(artifact: Path) -> dict[str, str]:
    """Return the first result of nodes without a name, by operator: the log calls them by their operator only."""
    nodes = onnx.load(artifact, load_external_data=False).graph.node
    return {node.op_type: node.output[0] for node in reversed(nodes) if not node.name and node.output}


def refused_nodes(log: str, unnamed: Mapping[str, str] | None = None) -> list[str]:
    """Return the nodes that the provider did not take, with its reasons, from its log.

    Args:
        log: All that it printed.
        unnamed: What nodes without a name are called, by operator.
    """
    reasons: dict[str, str] = {}
    for found in _REASON.finditer(log):
        reasons.setdefault(found["op"], found["reason"].strip())
    codes = {
        found["name"]: f"its types or shapes are not supported, error {found['code']}"
        for found in _INVALID.finditer(log)
    }
    nodes: dict[tuple[str, str], str] = {}
    for line in log.splitlines():
        if "Unsupported nodes in QNN EP" in line:
            for found in _UNSUPPORTED.finditer(line):
                why = codes.get(found["name"]) or reasons.get(found["op"], "")
                label = found["name"] or (unnamed or {}).get(found["op"], "")
                text = f"{found['op']} '{label}'" + (f" ({why})" if why else "")
                nodes.setdefault((found["op"], found["name"]), text)
    return list(nodes.values())


QNN_HTP = QnnHtpTarget(
    name="qnn-htp",
    description=(
        "Qualcomm's Hexagon Tensor Processor through ONNX Runtime: fixed shapes (--shape), integers between Q and DQ "
        "nodes (recipes w8a16, which is the default here, w8a8, w4a16, w4a8), compiled by Qualcomm's own compiler with "
        "no node left to the CPU. Without the device it runs in the vendor's simulator."
    ),
    package=PACKAGE,
    lowering=(
        "raise_block_weights, fold_rotary_tables, lower_npu_ops, fold_constants{max_growth=67108864}, legalize_masks, "
        "legalize_indices, cleanup, lower_portable, deduplicate_initializers"
    ),
    domains=("",),
    min_opset=13,
    max_opset=24,
    qdq=HTP_RULES,
    weight_bits=(4, 8),
    fixed_shapes=True,
    simulated=True,
    lint_is_final=True,
    extra=EXTRA,
    default_recipe="w8a16",
)
