"""Run source and artifact on the same cases, one case at a time, and measure how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.decoder import DecoderRunner, DecoderState
from onnxslim_llm.runtime.session import Array, Session
from onnxslim_llm.runtime.signature import DecoderSignature, find_decoder
from onnxslim_llm.verify.cache_shapes import changed_caches, fitted_feeds
from onnxslim_llm.verify.cases import DecoderCase, TensorCase
from onnxslim_llm.verify.figures import ErrorFigures, ErrorSums, LogitSums
from onnxslim_llm.verify.gates import Precision, lossless_limit
from onnxslim_llm.verify.greedy import GreedyMatch, greedy_match
from onnxslim_llm.verify.inputs import Plan
from onnxslim_llm.verify.vocabulary import CommonTokens

__all__ = ["Comparison", "compare"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        kind: "decoder" or "tensors".
        inputs: names of the cases that were compared.
        skipped: (case, reason) of those that were not.
        total: error over all compared outputs together; of a decoder, over the logits at real tokens.
        outputs: error by output name.
        nonfinite: by output name, number of elements that are finite in the source only.
        tokens, kl_mean, kl_max, top1_agreement, greedy: decoders only; divergences in nats.
    """

    kind: Literal["decoder", "tensors"]
    inputs: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    total: ErrorFigures
    outputs: dict[str, ErrorFigures]
    nonfinite: dict[str, int]
    tokens: int = 0
    kl_mean: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    greedy: GreedyMatch | None = None

    def figures(self) -> dict[str, float | None]:
        """The figures that gates and the manifest name; None where the model has none."""
        return {
            "max_abs": self.total.max_abs,
            "max_rel": self.total.max_rel,
            "sqnr_db": self.total.sqnr_db,
            "cosine": self.total.cosine,
            "kl_mean": self.kl_mean,
            "top1_agreement": self.top1_agreement,
            "greedy_prefix_match": self.greedy.prefix_match if self.greedy else None,
            "nonfinite": float(sum(self.nonfinite.values())),
        }

    def to_json(self) -> dict[str, Any]:
        """As plain values for the manifest."""
        return {
            "kind": self.kind,
            "inputs": list(self.inputs),
            "skipped": [{"where": where, "reason": reason} for where, reason in self.skipped],
            **self.figures(),
            "nonfinite": self.nonfinite,
            "outputs": {name: asdict(figures) for name, figures in self.outputs.items()},
            "tokens": self.tokens,
            "kl_max": self.kl_max,
            "greedy": asdict(self.greedy) if self.greedy else None,
        }


class _Collector:
    """Errors by output and in total."""

    def __init__(self) -> None:
        self.total, self.outputs, self.logits = ErrorSums(), dict[str, ErrorSums](), LogitSums()

    def add(self, name: str, source: Array, artifact: Array) -> None:
        if source.shape != artifact.shape:
            raise ModelError(f"the artifact's output is {list(artifact.shape)}, not {list(source.shape)}", where=name)
        if source.dtype.kind in "OUS":
            same = source == artifact
            source, artifact = same | True, same
        self.total.add(source, artifact)
        self.outputs.setdefault(name, ErrorSums()).add(source, artifact)

    def nonfinite(self) -> dict[str, int]:
        return {name: sums.nonfinite for name, sums in self.outputs.items() if sums.nonfinite}


def compare(
    source: Session,
    artifact: Session,
    plan: Plan,
    *,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Comparison:
    """Compare two open models on the inputs of `plan`.

    Args:
        source: opened without graph optimisations, so that nothing hides an error.
        artifact: opened by its target, as it will be deployed.
        plan: made for the source.
        precision: of the source's activations; says how close two logits must be for their order not to count.
        progress: called with (done, of how many) runs.

    Raises:
        ModelError: one of the models fails, the artifact lacks an output or input of the source or has another shape,
            or no case could be compared.
    """
    tell = progress or (lambda done, total: None)
    if plan.kind == "tensors":
        return _compare_tensors(source, artifact, plan, lambda done: tell(done, len(plan.cases)))
    ours = DecoderRunner(source)
    theirs = DecoderRunner(artifact, _signature(artifact, ours))
    if ours.vocab != theirs.vocab:
        raise ModelError(
            f"the artifact has a vocabulary of {theirs.vocab}, the source of {ours.vocab}", where=artifact.where
        )
    collector, used, skipped = _Collector(), list[str](), list(plan.skipped)
    name, common = ours.signature.logits, CommonTokens.of(ours, theirs)
    cases = [case for case in plan.cases if isinstance(case, DecoderCase)]
    done, steps = 0, sum(len(case.pieces) for case in cases) + (plan.greedy_tokens if plan.prompts is not None else 0)
    for case in cases:
        before = collector.total.source_nan
        try:
            for whole, other in _decoder_pairs(ours, theirs, case, common):
                expected, got = common.logits(whole), common.logits(other)
                collector.add(name, expected, got)
                collector.logits.add(expected, got)
                done += 1
                tell(done, steps)
        except _SourceFailsError as failure:
            skipped.append((case.name, f"the source itself fails: {failure}"))
            continue
        if collector.total.source_nan > before:
            skipped.append((case.name, "the source itself gives NaN for some real tokens; they are left out"))
        used.append(case.name)
    if not collector.logits.tokens and not collector.nonfinite():
        raise ModelError(
            "the source gives no finite logits to compare with",
            where=name,
            todo="give other inputs with --calib, or look for NaN in the model's weights",
        )
    greedy = None
    if plan.prompts is not None and plan.greedy_tokens:
        # Two logits that may each move by the lossless limit can swap places below twice this distance.
        tie = 2 * lossless_limit(precision, collector.total.figures().absmax)
        greedy = greedy_match(
            ours,
            theirs,
            common.fed(plan.prompts),
            plan.greedy_tokens,
            tie_margin=tie,
            progress=lambda made: tell(min(done + made, steps), steps),
        )
        tell(steps, steps)
    logits = collector.logits
    return Comparison(
        "decoder",
        tuple(used),
        tuple(skipped),
        collector.total.figures(),
        {name: sums.figures() for name, sums in collector.outputs.items()},
        collector.nonfinite(),
        tokens=logits.tokens,
        kl_mean=logits.kl_mean,
        kl_max=float(logits.kl.max()) if logits.tokens else None,
        top1_agreement=logits.top1_agreement,
        greedy=greedy,
    )


def _signature(artifact: Session, source: DecoderRunner) -> DecoderSignature | None:
    """The artifact's own; the source's if the graph leaves open what only the source's folder tells (a head size)."""
    same = [info.name for info in artifact.inputs] == [info.name for info in source.session.inputs]
    return find_decoder(artifact)[0] or (source.signature if same else None)


class _SourceFailsError(Exception):
    """Why the source cannot run a case (operators that refuse batches of chunks, say); never leaves this file."""


def _decoder_pairs(
    ours: DecoderRunner, theirs: DecoderRunner, case: DecoderCase, common: CommonTokens
) -> Iterator[tuple[Array, Array]]:
    """Logits [n, V] of both models at the real tokens of every piece."""
    mine: DecoderState | None = None
    other: DecoderState | None = None
    for whole, mask in case.pieces:
        ids = common.fed(whole)
        try:
            expected, mine = ours.prefill(ids, mine, mask)
        except ModelError as error:
            raise _SourceFailsError(error.what) from error
        got, other = theirs.prefill(ids, other, mask)
        kept = min(expected.shape[1], got.shape[1])  # 1 where either gives the last token only
        real = mask[:, -kept:] > 0
        yield expected[:, -kept:][real], got[:, -kept:][real]


def _compare_tensors(source: Session, artifact: Session, plan: Plan, tell: Callable[[int], None]) -> Comparison:
    left_out = changed_caches(source, artifact)
    missing = {i.name for i in source.outputs} - {i.name for i in artifact.outputs} - left_out
    extra = {i.name for i in artifact.inputs} - {i.name for i in source.inputs}
    if missing or extra:
        what = f"lacks the output '{min(missing)}'" if missing else f"has a new input '{min(extra)}'"
        raise ModelError(f"the artifact {what}", where=artifact.where)
    collector, used = _Collector(), list[str]()
    for done, case in enumerate(case for case in plan.cases if isinstance(case, TensorCase)):
        expected = {name: array for name, array in source.run(case.feeds).items() if name not in left_out}
        got = artifact.run(fitted_feeds(case.feeds, artifact), list(expected))
        for name, array in expected.items():
            collector.add(name, array, got[name])
        used.append(case.name)
        tell(done + 1)
    figures = collector.total.figures()
    if figures.count == 0 and not collector.nonfinite():
        raise ModelError(
            "there is nothing to compare: the source gives no finite values",
            where=source.where,
            todo="give other inputs with --calib, or look for NaN in the model's weights",
        )
    outputs = {name: sums.figures() for name, sums in collector.outputs.items()}
    return Comparison("tensors", tuple(used), plan.skipped, figures, outputs, collector.nonfinite())
