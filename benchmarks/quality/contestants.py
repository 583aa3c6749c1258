"""What a contestant of the quality table is, and those of ours: presets, settings and a ladder of sizes.

The others are in `peers_onnx` and `peers_gguf`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx
from subjects import Subject

from onnxslim_llm.compiler.flow import compile as compile_model
from onnxslim_llm.recipe import Recipe, preset_names
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.targets import get_target

#: Makes an artifact in a folder and returns its file.
Make = Callable[[Subject, Path], Path]

ROOT = Path(__file__).resolve().parents[2]


class NothingChanged(Exception):  # noqa: N818 - an outcome, not an error
    """A peer returned the model as it was."""


@dataclass(frozen=True)
class Contestant:
    """One line of the table.

    Attributes:
        group: whose it is.
        name: what is done.
        make: see `Make`.
        stamp: what a stored result depends on, besides the subject.
        target: opens the artifact; plain ONNX Runtime or llama.cpp if there is none.
        kinds: of subjects that it can do.
        fits: which of these it is worth making for.
    """

    group: str
    name: str
    make: Make
    stamp: str
    target: str = ""
    kinds: tuple[str, ...] = ("decoder", "encoder")
    fits: Callable[[Subject], bool] = lambda _: True

    def takes(self, subject: Subject) -> bool:
        """Whether there is a row of it in the subject's table."""
        return subject.kind in self.kinds and self.fits(subject)

    def open(self, artifact: Path) -> Path | Session:
        """Return an open session, or the file where llama.cpp runs it."""
        if artifact.suffix == ".gguf":
            return artifact
        return get_target(self.target).open(artifact, threads=1) if self.target else open_session(artifact, threads=1)


#: Our settings beside the presets: name, preset, what is changed, target.
SETTINGS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("4 bits everywhere, RTN", "int4-fast", (_all_bits := (
        *("quantize_weights.embedding_bits=4", "quantize_weights.lm_head_bits=4", "quantize_weights.sensitive_bits=4"),
    )) + ("quantize_weights.method=rtn",), "portable"),
    ("4 bits everywhere", "int4-fast", _all_bits, "portable"),
    *(
        (f"4 bits everywhere, {label}", preset, (*_all_bits, "quantize_weights.target_bits=0"), "portable")
        for label, preset in (
            ("own text", "int4-probed"),
            ("calibrated", "int4-calibrated"),
            ("tuned", "int4-tuned"),
        )
    ),
    ("8 bits, calibrated", "int8", (_calibrated := ("quantize_weights.method=calibrated",)), "ort-cpu-ops"),
    ("int8, exact", "int8", (_exact := ("quantize_weights.accuracy=exact",)), "ort-cpu-ops"),
    ("8 bits, calibrated, exact", "int8", (*_calibrated, *_exact), "ort-cpu-ops"),
    ("8 bits, block 16, calibrated, exact", "int8", (*_calibrated, *_exact, "quantize_weights.block=16"),
     "ort-cpu-ops"),
)  # fmt: skip
#: Sizes that bits are shared out for, in bits per weight, by the target; graph and norms come on top.
LADDER = {
    "ort-cpu-ops": (2.9, 3, 3.25, 3.5, 3.8, 4, 4.2, 4.4, 4.6, 4.7, 4.8, 5, 5.3, 5.6, 6, 6.4, 7, 7.5, 8.2, 8.6),
    "ort-cpu": (4.4, 6),
}
#: The same without data, and with text that the model writes itself.
LADDER_WITHOUT_DATA = (4.4, 5, 6)
LADDER_OF_OWN_TEXT = (4.4, 4.8, 5.3, 5.6, 6.4, 7, 8.2)
#: The same with codes tuned afterwards, for decoders.
LADDER_TUNED = (3.5, 4, 4.4, 4.7)
#: The preset that makes of every model of the table what int4 makes: none is too large for that one.
_SHOWN_AS_INT4 = "int4-probed"
#: Encoders are measured at these sizes only.
_ENCODER_SIZES = (4.4, 6, 7.5, 8.2)


def ours(extra: tuple[tuple[str, str, tuple[str, ...], str], ...] = ()) -> Iterator[Contestant]:
    """All presets that change nothing but weights, the settings above, and the ladder of sizes."""
    code = _code_digest()
    for name in preset_names():
        recipe = Recipe.load(name)
        changes = [step.name for step in recipe.build() if not step.lossless]
        if changes[:1] != ["quantize_weights"] or {*changes[1:]} - {"recode_in_order"} or name == _SHOWN_AS_INT4:
            continue
        kinds = ("decoder",) if name == "int4" else ("decoder", "encoder")  # encoders get int4-fast from it
        for target in ("portable", "ort-cpu-ops"):
            make = partial(_compiled, name, (), target)
            yield Contestant("ours", f"{name} ({target})", make, f"{code} {recipe.digest()}", target, kinds)
    for label, preset, settings, target in (*SETTINGS, *extra):
        make = partial(_compiled, preset, settings, target)
        kinds = ("decoder",) if preset in (_SHOWN_AS_INT4, "int4-tuned") else ("decoder", "encoder")
        yield Contestant("ours", f"{label} ({target})", make, f"{code} {preset} {settings}", target, kinds)
    for target, sizes in LADDER.items():
        for size in sizes:
            yield _rung(code, f"{size:g} bits, calibrated", "int4-calibrated", (), target, size)
    for size in LADDER_WITHOUT_DATA:
        yield _rung(code, f"{size:g} bits, without data", "int4-fast", (), "ort-cpu-ops", size)
    for size in LADDER_OF_OWN_TEXT:
        yield _rung(code, f"{size:g} bits, own text", _SHOWN_AS_INT4, (), "ort-cpu-ops", size)
    for size in LADDER_TUNED:
        tuned = _rung(code, f"{size:g} bits, tuned", "int4-tuned", (), "ort-cpu-ops", size)
        yield replace(tuned, kinds=("decoder",))


def _rung(code: str, label: str, preset: str, settings: tuple[str, ...], target: str, size: float) -> Contestant:
    changed = (*settings, f"quantize_weights.target_bits={size:g}")
    kinds = ("decoder", "encoder") if size in _ENCODER_SIZES and preset != _SHOWN_AS_INT4 else ("decoder",)
    make = partial(_compiled, preset, changed, target)
    return Contestant("ours", f"{label} ({target})", make, f"{code} {preset} {changed}", target, kinds)


def _compiled(preset: str, settings: tuple[str, ...], target: str, subject: Subject, folder: Path) -> Path:
    out = folder / "artifact"
    steps = Recipe.load(preset).with_settings(settings).build()
    wanting = [step for step in steps if step.wants_statistics]
    itself = bool(wanting) and all(step.takes_own_text for step in wanting)
    needs = bool(wanting) and not itself
    compile_model(
        subject.model,
        out,
        target=target,
        recipe=preset,
        settings=settings,
        calib=subject.calibration if needs else None,
        jobs=1,
        verify="off",
        force=True,
        # Collected once for all of ours; a change of how they are collected changes their key.
        statistics=folder.parent / f"statistics-{subject.name}-{'self' if itself else 'data'}",
    )
    return out / "model.onnx"


def _code_digest() -> str:
    """Identify the compiler's own code: its results are measured again when it changes."""
    digest = hashlib.sha256()
    for part in ("onnxslim_llm", "passes", "custom_ops"):
        for file in sorted((ROOT / part).rglob("*")):
            if file.suffix in (".py", ".toml", ".cpp", ".hpp"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# --- measuring --------------------------------------------------------------------------------------------------------


def package_stamp(package: str) -> str:
    """Name and version of an installed package: what a stored result of a peer depends on."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the distinct initializers and of the graph around them."""
    contents = {}
    for tensor in model.graph.initializer:
        data = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        contents[hashlib.sha256(data).digest()] = len(data)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        for part in ("raw_data", "float_data", "int32_data", "int64_data", "external_data"):
            tensor.ClearField(part)
    return sum(contents.values()) + bare.ByteSize()


def artifact_bytes(artifact: Path) -> int:
    """Bytes of an artifact, graph and weights, each distinct weight counted once."""
    return artifact.stat().st_size if artifact.suffix == ".gguf" else weight_bytes(onnx.load(artifact))


def clear(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
