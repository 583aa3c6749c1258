"""Which programs run a model, and how far their results are from the source's: each is run for real."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxslim_llm.compiler.client_files import write_client_files
from onnxslim_llm.compiler.fixed_source import FixedSource, Shapes
from onnxslim_llm.compiler.lowering import intake_passes, lowering_passes
from onnxslim_llm.consumers.consumer import Consumer, Form, Report, consume
from onnxslim_llm.errors import ModelError, SlimError
from onnxslim_llm.ir.model import Model, open_model, resolve_model_path
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.ir.shapes.fixing import free_dimensions, parse_sizes, resolve_sizes
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.rewrite.registry import make_pass
from onnxslim_llm.runtime.signature import find_decoder
from onnxslim_llm.targets import get_target

if TYPE_CHECKING:
    from onnxslim_llm.runtime.session import Session

__all__ = ["PRIMITIVE_LOWERING", "Checker"]

Array = NDArray[np.generic]
_SEED = 0
_TOKENS = 16
_MOST_SEGMENTS = 2

#: For converters that read operators of opset 17 or so: norms and Gelu as arithmetic, masks as numbers.
PRIMITIVE_LOWERING = (
    "fold_rotary_tables, lower_npu_ops{native_norms=false,native_gelu=false}, fold_constants{max_growth=67108864}, "
    "legalize_masks, legalize_indices, legalize_means, cleanup, lower_portable, deduplicate_initializers"
)


@dataclass
class Checker:
    """Runs one model in any number of consumers.

    Attributes:
        source: The model's file or folder.
        shape: Sizes of symbolic dimensions; those that are not named become 1 (batches), 0 (caches) or 16.
        seconds: Time limit of one consumer with one form.
        threads: Of ONNX Runtime, for the source.
    """

    source: Path
    shape: str = ""
    seconds: float = 600.0
    threads: int = 0
    notes: list[str] = field(default_factory=list)

    def run(self, consumers: Sequence[Consumer], *, every_form: bool = False) -> Iterator[Report]:
        """Yield a report for each consumer: of the first form that runs, else of the first that is tried.

        Args:
            consumers: Whom to ask.
            every_form: Yield one for each form instead.

        Raises:
            UsageError: A size fits no dimension.
            ModelError: The source is no valid model, or does not run itself.
        """
        with tempfile.TemporaryDirectory(prefix="onnxslim-") as name:
            forms = _Forms(resolve_model_path(self.source), self.shape, Path(name), self.threads)
            self.notes.append(f"sizes: {forms.shapes.text or 'as in the model'}")
            for consumer in consumers:
                there, detail = consumer.installed()
                if not there:
                    yield Report(consumer.name, None, "not installed", detail)
                elif consumer.decoders_only and not forms.has_cache:
                    yield Report(consumer.name, None, "not for this model", "it is no decoder with a KV cache")
                else:
                    reports = self._forms_of(consumer, forms)
                    yield from reports if every_form else [_best(list(reports))]

    def _forms_of(self, consumer: Consumer, forms: _Forms) -> Iterator[Report]:
        for form in consumer.forms:
            try:
                model = forms.file(form)
            except SlimError as error:
                yield Report(consumer.name, form, "failed", f"this form cannot be made: {error.what}")
                continue
            wanted = forms.expected
            if consumer.decoders_only:
                wanted = {key: value for key, value in wanted.items() if key == forms.logits}
            report = consume(consumer, model, form, forms.feeds, wanted, seconds=self.seconds)
            yield report
            if report.status == "runs":
                return


def _best(reports: list[Report]) -> Report:
    return next((report for report in reports if report.status == "runs"), reports[0])


class _Forms:
    """The forms of one model, each made when it is first asked for, and what the source gives."""

    def __init__(self, source: Path, shape: str, folder: Path, threads: int) -> None:
        from onnxslim_llm.runtime.session import open_session  # loads the runtime

        self._source = source
        self._folder = folder
        self._made: dict[str, Path] = {}
        model = open_model(source)
        wanted = resolve_sizes(model.graph.inputs, parse_sizes(shape))
        sizes = {name: _usual_size(name) for _, name in free_dimensions(model.graph.inputs)} | wanted
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        self.shapes = Shapes.of(model, get_target("qnn-htp"), text)
        signature, _ = find_decoder(model.to_proto("omit"))
        self.has_cache = signature is not None and bool(signature.caches)
        self.logits = signature.logits if signature is not None else ""
        fixed = FixedSource(source, self.shapes, folder / "source", threads)
        self._made["source"] = fixed.path
        session = open_session(fixed.path, threads=threads, optimise=False)
        self.feeds = _feeds(session, fixed)
        self.expected = session.run(self.feeds)

    def file(self, form: Form) -> Path:
        """Return the file of a form.

        Raises:
            SlimError: It cannot be made of this model.
        """
        if form not in self._made:
            path = self._folder / form / "model.onnx"
            path.parent.mkdir()
            self._make(form, path)
            self._made[form] = path
        return self._made[form]

    def _make(self, form: Form, path: Path) -> None:
        portable = get_target("portable")
        model = open_model(self._source)
        recipe = Recipe.load("safe").build()
        lowering = lowering_passes(portable, "separate", None)
        fixing: list[Pass] = [] if form == "folder" else self.shapes.passes()
        if form in ("primitive", "unpadded"):
            lowering = self.shapes.for_lowering(list(Pipeline(PRIMITIVE_LOWERING).passes))
        if form == "unpadded":
            fixing = [*fixing, make_pass("fix_inputs", {"values": _unpadded(model)})]
        Pipeline([*fixing, *intake_passes(portable), *recipe, *lowering]).run(model, Context(target=portable))
        save_model(model, path)
        if form == "folder":
            written, notes = write_client_files(path, self._source.parent)
            if not written:
                raise ModelError(notes[0] if notes else "no genai_config.json can be written", where=str(self._source))


def _unpadded(model: Model) -> str:
    """Return the values of masks, positions and segments for one text without padding, as fix_inputs takes them.

    Masks and positions are known by their names: nothing else tells them from other integers.
    """
    inputs = (tensor for tensor in model.graph.inputs if tensor.dtype is not None)
    names = [tensor.name for tensor in inputs if np.dtype(tensor.dtype).kind in "iub"]
    masks = [f"{name}=1" for name in names if "mask" in name]
    segments = [f"{name}=0" for name in _segments(model.to_proto("omit")) if name in names]
    return ",".join([*masks, *(f"{name}=range" for name in names if "position" in name), *segments])


def _segments(proto: onnx.ModelProto) -> list[str]:
    """Return the inputs that choose one of two rows: which of two texts a token is in.

    The converter pnnx computes constants with indices of its own, up to the number of tokens, and stops at such tables.
    """
    from onnxslim_llm.runtime.feeds import index_bounds

    return [name for name, rows in index_bounds(proto).items() if rows <= _MOST_SEGMENTS]


def _usual_size(name: str) -> int:
    if "batch" in name.lower():
        return 1
    return 0 if "past" in name.lower() else _TOKENS


def _feeds(session: Session, fixed: FixedSource) -> dict[str, Array]:
    from onnxslim_llm.runtime.decoder import DecoderRunner
    from onnxslim_llm.runtime.feeds import index_bounds, random_feeds

    rng = np.random.default_rng(_SEED)
    samples = fixed.samples(None)
    if samples is not None:
        with np.load(next(iter(sorted(samples.iterdir())))) as file:
            return {name: file[name] for name in file.files}
    signature, _ = find_decoder(session)
    if signature is not None and signature.length:
        runner = DecoderRunner(session, signature)
        return runner.arrays(rng.integers(0, runner.vocab, (signature.batch or 1, signature.length)))
    proto = open_model(fixed.path).to_proto("omit")
    feeds = random_feeds(session.inputs, {}, rng, bounds=index_bounds(proto))
    return feeds | {name: np.zeros_like(feeds[name]) for name in _segments(proto)}
