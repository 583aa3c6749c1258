"""What passes cost a model's answers: one model, its calibration statistics and its answers made once for many trials.

A trial runs `cleanup`, the safe fusions and its own passes, lowers the model for the portable target, saves it and
compares it with the source in ONNX Runtime, on the same held-out tokens (decoders: mean KL divergence) or sentences
(encoders: mean 1 - cosine of the vectors). The models are those of benchmarks/quality/subjects.py.
"""

from __future__ import annotations

import fnmatch
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))

from encoder_quality import compare, embed  # noqa: E402
from recorded import Recorded  # noqa: E402
from subjects import MINILM_NAME, SAMPLE_NAME, Subject, minilm, sample, story, story_names  # noqa: E402

from onnxslim_llm.compiler.calibration import Calibrator  # noqa: E402
from onnxslim_llm.compiler.lowering import in_order  # noqa: E402
from onnxslim_llm.compiler.observation import make_gradient_source  # noqa: E402
from onnxslim_llm.compiler.progress import Silent  # noqa: E402
from onnxslim_llm.gradients.source import Figure, GradientSource, StoredFigures  # noqa: E402
from onnxslim_llm.ir.model import Model, open_model  # noqa: E402
from onnxslim_llm.ir.save import SaveOptions, save_model  # noqa: E402
from onnxslim_llm.ir.weights import weight_of  # noqa: E402
from onnxslim_llm.recipe import Recipe  # noqa: E402
from onnxslim_llm.rewrite.context import Context  # noqa: E402
from onnxslim_llm.rewrite.pipeline import Pipeline  # noqa: E402
from onnxslim_llm.runtime.decoder import DecoderRunner  # noqa: E402
from onnxslim_llm.runtime.session import Session, open_session  # noqa: E402
from onnxslim_llm.targets import get_target  # noqa: E402
from onnxslim_llm.verify.quality import Difference, evaluate_tokens  # noqa: E402

__all__ = ["LossBench", "Result", "subjects"]


@dataclass(frozen=True)
class Result:
    """One artifact.

    Attributes:
        bytes: Of its file.
        zeros: Share of zeros in its float matrices.
        loss: Mean KL divergence in nats, or mean 1 - cosine.
        difference: All that was compared; None for encoders.
        parameters: Of the weights that `split_low_rank` looked at, before and after; None where nothing was split.
    """

    bytes: int
    zeros: float
    loss: float
    difference: Difference | None
    parameters: tuple[int, int] | None


@dataclass
class _Remembered:
    """Figures of gradients of one model, computed once: all trials begin with the same weights."""

    source: GradientSource
    known: dict[Figure, Mapping[str, StoredFigures]] = field(default_factory=dict)

    def check(self) -> None:
        self.source.check()

    def figures(self, model: Model, weights: Sequence[str], figure: Figure) -> Mapping[str, StoredFigures]:
        if figure not in self.known:
            self.known[figure] = self.source.figures(model, weights, figure)
        return self.known[figure]


class LossBench:
    """One model, its calibration statistics and its answers."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.calibrator = Calibrator(subject.model, subject.calibration, folder, 1, Silent())
        self.gradients = _Remembered(make_gradient_source(self.calibrator))
        self.source: Session | Recorded = open_session(subject.model, threads=1)
        if subject.kind == "decoder":
            self.source = Recorded(DecoderRunner(self.source))

    def measure(self, passes: str) -> Result:
        """Compile with a list of passes and compare with the source."""
        target = get_target("portable")
        model = open_model(self.subject.model)
        Pipeline(Recipe.load("safe").build()).run(model, Context(target=target))
        pipeline = Pipeline(in_order(Pipeline(passes).passes, Pipeline(target.lowering).passes))
        statistics = self.calibrator.wanted_by(pipeline.passes)
        context = Context(target=target, statistics=statistics, gradients=self.gradients)
        records = pipeline.run(model, context)
        split = next((r.detail["parameters"] for r in records if r.name == "split_low_rank" and r.changed), None)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            size = save_model(model, file, SaveOptions(jobs=1)).bytes
            zeros = _zero_share(open_model(file))
            loss, difference = self._compare(target.open(file, threads=1))
        return Result(size, zeros, loss, difference, tuple(split) if split else None)

    def _compare(self, artifact: Session) -> tuple[float, Difference | None]:
        subject = self.subject
        if isinstance(self.source, Session):
            vectors = [embed(session, subject.sentences) for session in (self.source, artifact)]
            return compare(*vectors).distance_mean, None
        found = evaluate_tokens(
            artifact, subject.tokens, versus=self.source, window=subject.window, threads=1, greedy=False
        ).difference
        assert found is not None
        return found.kld_mean, found


def _zero_share(model: Model) -> float:
    weights = {weight_of(c).key: weight_of(c) for c in model.constants()}
    matrices = [w for w in weights.values() if len(w.shape) == 2 and str(w.dtype).startswith("float")]
    total = sum(w.size for w in matrices)
    return 1 - sum(int(np.count_nonzero(w.view())) for w in matrices) / max(total, 1)


def subjects(data: Path | None, pattern: str, tokens: int, work: Path) -> Iterator[Subject]:
    """Yield the models whose names match and that are there.

    Args:
        data: Folder with the story models; without it there is the sample model only.
        pattern: Of names.
        tokens: Of held-out text that decoders are judged by.
        work: Where models and calibration data are prepared.
    """
    makers: dict[str, Callable[[], Subject | None]] = {SAMPLE_NAME: partial(sample, work, tokens)}
    for name in story_names(data) if data else []:
        makers[name] = partial(story, data, name, work, tokens)
    makers[MINILM_NAME] = partial(minilm, work)
    for name, make in makers.items():
        if (data or name == SAMPLE_NAME) and fnmatch.fnmatch(name, pattern):
            subject = make()
            if subject is not None:
                yield subject
