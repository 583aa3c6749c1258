"""Verification as part of a compile: what is fed, which gates count, and which pass is to blame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxslim_llm.artifact.manifest import Gate as GateEntry
from onnxslim_llm.artifact.manifest import LayerError, Quality, Verify
from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.observation import make_gradient_source, make_observer, make_replayer, make_tuner
from onnxslim_llm.compiler.progress import Progress
from onnxslim_llm.compiler.text_tokens import TextTokens
from onnxslim_llm.errors import ModelError, SlimError, UsageError
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.pipeline import Gate, Pipeline
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.targets import Target

if TYPE_CHECKING:
    from onnxslim_llm.runtime.session import Session
    from onnxslim_llm.verify.check import Verification, Verifier
    from onnxslim_llm.verify.inputs import Level

__all__ = ["Judge", "may_roll_back"]

#: Models whose weights fit into one proto with room to spare are run in memory between passes; larger ones are not.
IN_MEMORY_BYTES = 1 << 30

#: Tokens of the calibration text that quality is measured on.
QUALITY_TOKENS = {"fast": 4096, "full": 65_536}

#: In a simulator a run takes seconds: so many cases and tokens are enough to tell a wrong artifact.
SIMULATED_CASES = 4
SIMULATED_TOKENS = {"fast": 256, "full": 4096}

#: The pass after which a decoder has a KV cache though its source has none.
_ADDS_CACHE = "add_kv_cache"
_ARRAY_SUFFIXES = (".npz", ".npy")


def may_roll_back(step: Pass, *, broken: bool = False) -> bool:
    """Whether the model is complete without a pass: lowering must stay, and what changes results was asked for.

    Args:
        step: The pass.
        broken: The model does not run at all with it. A structural pass is undone then: inputs, outputs or shapes do
            not fit each other.
    """
    return (step.lossless or (broken and step.structural)) and step.group != "lower"


class Judge:
    """Compares artifacts with the source. Opens the source once, on first use.

    Args:
        source: The source's .onnx file.
        target: Opens the artifact as it will be deployed.
        recipe: Says which gates apply.
        level: "fast", "full" or "off".
        calib: Text, or .npz/.npy inputs; a folder of such files.
        threads: Of the runtime.
        progress: Told about the runs.
        calibrator: Has the statistics for passes that are run again.
    """

    def __init__(
        self,
        source: Path,
        target: Target,
        recipe: Recipe,
        level: str,
        calib: Path | None,
        threads: int,
        progress: Progress,
        calibrator: Calibrator,
    ) -> None:
        self._calibrator = calibrator
        self._source = source
        self._target = target
        self._recipe = recipe
        self._level = level
        self._calib = calib
        self._threads = threads
        self._progress = progress
        self._verifier: Verifier | None = None
        self.guilty = ""
        self.notes: list[str] = []

    def judge(self, artifact: Path) -> Verify | None:
        """Compare the artifact with the source; None if verification is off.

        Raises:
            ModelError: The source itself cannot be run, or the artifact cannot.
        """
        if self._level == "off":
            return None
        self._progress.stage("verify", None, "runs")
        try:
            verifier = self._open()
        except ModelError as error:
            error.todo = "; ".join(filter(None, [error.todo, "--verify off compiles without running the model"]))
            raise
        session = self._target.open(artifact, threads=self._threads)
        if self._recipe.gates == "lossless" and self._dequantizes(artifact):
            # The runtime fuses these nodes into kernels that round activations to int8, which is not our doing.
            session = self._open_exactly(artifact)
            self.notes.append(
                "verified without the runtime's own fusions: they round activations of quantized products"
            )
        result = verifier.check(session, self._recipe.gates, progress=self._advance)
        return _entry(result, self._level)

    def measure(self, artifact: Path) -> Quality | None:
        """Measure perplexity and divergence on the calibration text; None if verification is off or there is no text.

        Raises:
            ModelError: One of the models gives logits that are not finite, or the tokenizer does not fit.
        """
        texts = self._texts()
        if self._level == "off" or not texts or self._open().plan.kind != "decoder":
            return None
        from onnxslim_llm.verify.quality import evaluate

        self._progress.stage("quality", None, "tokens")
        found = evaluate(
            self._target.open(artifact, threads=self._threads),
            texts[0],
            load_tokenizer(self._source.parent),
            versus=self._open().session,
            max_tokens=(SIMULATED_TOKENS if self._target.simulated else QUALITY_TOKENS)[self._level],
            progress=self._advance,
        )
        difference = found.difference
        assert difference is not None, "a source was given"
        return Quality(
            tokens=found.tokens,
            ppl_source=difference.ppl_source,
            ppl_artifact=found.ppl,
            kld_mean=difference.kld_mean,
            kld_p99=difference.kld_p99,
            top1_agreement=difference.top1_agreement,
        )

    def diagnose(self, layers: list[LayerError], artifact: Path) -> list[LayerError]:
        """Return the layers with the measured errors of their outputs; as they are if verification is off."""
        if self._level == "off" or not layers:
            return layers
        from onnxslim_llm.compiler.diagnosis import measure_layers

        self._progress.stage("diagnose", None)
        return measure_layers(layers, self._source, artifact, self._inputs()[0], self._threads)

    def find_guilty(self, passes: list[Pass]) -> Pass | None:
        """Return the first pass after which the model misses the gates or does not run, by bisection.

        None if there is none: the model runs and passes in memory, or the source itself does not.
        """
        from onnxslim_llm.verify.guilty import first_failing  # loads onnxruntime

        self._progress.stage("find the guilty pass", None)

        def fails(count: int) -> bool:
            model = open_model(self._source)
            first = passes[:count]
            context = Context(
                target=self._target,
                statistics=self._calibrator.wanted_by(first),
                cache_ranges=self._calibrator.cache_ranges_wanted_by(first),
                observer=make_observer(self._calibrator),
                gradients=make_gradient_source(self._calibrator),
                tuner=make_tuner(self._calibrator),
                replayer=make_replayer(self._calibrator),
                tokens=TextTokens(self._calibrator),
            )
            Pipeline(first).run(model, context)
            try:
                return not self._check_in_memory(model, self._recipe.gates)
            except ModelError:  # it opens, but it does not run, or not like the source
                return True

        index = first_failing(len(passes), fails)
        if index is None:
            return None
        self.guilty = f"pass '{passes[index].name}'"
        return passes[index]

    def pass_gate(self) -> Gate | None:
        """Return the judge of single passes for `--verify full`: a lossless pass must leave the results as they are."""
        if self._level != "full":
            return None

        def gate(step: Pass, before: Model, after: Model) -> str:
            if not may_roll_back(step):
                return self._not_running(after) if may_roll_back(step, broken=True) else ""
            try:
                fine = self._check_in_memory(after, "lossless") or not self._check_in_memory(before, "lossless")
            except SlimError as error:
                return f"the model does not run after it: {error.what}"
            return "" if fine else "the results differ after it"

        return gate

    def _not_running(self, model: Model) -> str:
        """Return why a model does not run like a model of its kind, or nothing."""
        try:
            return "" if self._check_in_memory(model, "none") else "the model does not run after it"
        except SlimError as error:
            return f"the model does not run after it: {error.what}"

    def _dequantizes(self, artifact: Path) -> bool:
        return "DequantizeLinear" in open_model(artifact).census()

    def _open_exactly(self, artifact: Path) -> Session:
        from onnxslim_llm.runtime.session import open_session

        return open_session(artifact, threads=self._threads, optimise=False)

    def _check_in_memory(self, model: Model, gates: str) -> bool:
        from onnxslim_llm.runtime.session import open_session

        if model.weight_bytes() > IN_MEMORY_BYTES:
            note = "single passes are not verified: the model is too large to run in memory"
            self.notes += [] if note in self.notes else [note]
            return True
        try:
            session = open_session(model.to_proto("inline"), threads=self._threads)
        except ModelError:
            return False
        return self._open().check(session, gates).ok

    def _open(self) -> Verifier:
        if self._verifier is None:
            from onnxslim_llm.verify.check import Verifier  # loads onnxruntime: not for --verify off
            from onnxslim_llm.verify.inputs import shorter

            level: Level = "full" if self._level == "full" else "fast"
            tokens, arrays = self._inputs()
            self._verifier = Verifier(
                self._source,
                level=level,
                token_ids=tokens,
                arrays=arrays,
                threads=self._threads,
                stepwise=any(step.name == _ADDS_CACHE for step in self._recipe.passes),
            )
            if self._target.simulated:
                self._verifier.plan = shorter(self._verifier.plan, SIMULATED_CASES)
        return self._verifier

    def _inputs(self) -> tuple[list[int] | None, Path | None]:
        """Return tokens of the calibration text, or where the arrays are."""
        texts = self._texts()
        if not texts:
            return None, self._calib
        try:
            text = "\n".join(file.read_text(encoding="utf-8") for file in texts)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the calibration text cannot be read: {error}", where=str(self._calib)) from error
        return load_tokenizer(self._source.parent).encode(text), None

    def _texts(self) -> list[Path]:
        """Return the calibration's text files; none if there is no calibration, or if it consists of arrays."""
        calib = self._calib
        if calib is None:
            return []
        if not calib.exists():
            raise UsageError("there is no such calibration file", where=str(calib), todo="check the path after --calib")
        files = sorted(calib.iterdir()) if calib.is_dir() else [calib]
        if any(file.suffix in _ARRAY_SUFFIXES for file in files):
            return []
        texts = [file for file in files if file.suffix == ".txt"] if calib.is_dir() else files
        if not texts:
            raise UsageError("the folder has neither .npz, .npy nor .txt files", where=str(calib))
        return texts

    def _advance(self, done: int, total: int) -> None:
        self._progress.advance(done)


def _entry(result: Verification, level: str) -> Verify:
    found = result.comparison
    gates = [
        GateEntry(name=g.gate, limit=g.limit, value=g.value, ok=g.ok, comparison="<=" if g.direction == "max" else ">=")
        for g in result.gates
    ]
    known = {k: v for k, v in found.to_json().items() if k != "gates"}
    return Verify(**{**known, "inputs": list(found.inputs), "gates": gates, "level": level})
